"""Takes the activations of a running model: which rows, with which keys, to which writer."""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from dreamreader.engine import Flowing, Stream
from dreamreader.errors import InvalidInput
from dreamreader.harvest.spec import Capture, Choice
from dreamreader.ops.choose import choose, counts_of_budget, streams_of
from dreamreader.store.layout import POOLED, STORED, Moment, SiteLayout, tensors_of

if TYPE_CHECKING:
    from dreamreader.engine import Selection, StepInfo

OUTSIDE = Moment(-1, 0, np.nan, np.nan, np.nan)  # of what runs beside the denoising


class Sink(Protocol):
    """Where rows go; a writer, or what only counts them."""

    def site(self, layout: SiteLayout) -> int: ...

    def put(
        self,
        site: int,
        x: Tensor,
        places: Tensor,
        keys: Tensor,
        *,
        minus: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> int: ...


@dataclass
class Taken:
    """What a unit has of one site so far: rows, and runs of them with one moment and branch."""

    layout: SiteLayout
    number: int
    rows: int = 0
    segments: int = 0


@dataclass(frozen=True)
class _Call:
    """What calls with the same static part share: the keys of their entries."""

    samples: Int32[Tensor, " entries"]
    branches: Int32[Tensor, " entries"]
    choice: int  # calls with the same one, at the same moment, keep the same tokens


@dataclass
class _Choice:
    """The rows that are kept of a call."""

    places: Int32[Tensor, "places 2"]
    keys: Int32[Tensor, "rows 4"]
    groups: Int32[Tensor, " rows+1"] | None


@dataclass(eq=False)
class Collector:
    """Streams of the captures of a spec, which give the chosen rows to a writer.

    Args:
        captures: of the spec, each with the names of its sites.
        seed: of random tokens.
        sink: where rows go.
        calls: how often a budget is split where the schedule does not say it.

    Attributes:
        moments, branches: what the keys of the rows of this unit call by number.
        taken: rows of each site in this unit.
    """

    captures: list[tuple[Capture, list[str]]]
    seed: int
    sink: Sink
    calls: int | None = None
    moments: list[Moment] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    taken: dict[str, Taken] = field(default_factory=dict)
    _first: int = 0
    _offset: int = 0
    _at: int = -1
    _numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    _calls: "dict[Selection, _Call]" = field(default_factory=dict)
    _alike: dict[tuple, int] = field(default_factory=dict)
    _choices: dict[int, _Choice] = field(default_factory=dict)
    _drawn: dict[tuple, Int64[Tensor, " entries"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.streams = [
            Stream(names, partial(self._keep, number), **capture.selection)  # pyright: ignore
            for number, (capture, names) in enumerate(self.captures)
        ]

    def begin(self, first: int) -> None:
        """Starts a unit, whose first sample has this number in the whole job."""
        self._first = first
        self.moments, self.branches, self.taken, self._numbers = [], [], {}, {}

    def batch(self, offset: int) -> None:
        """Starts a run of the model, whose first row is this sample of the unit."""
        self._offset, self._at = offset, -1
        for each in (self._calls, self._alike, self._choices, self._drawn):
            each.clear()

    @property
    def rows(self) -> int:
        return sum(each.rows for each in self.taken.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the shards of this unit will have, at most."""
        return sum(
            tensors_of(each.layout, each.rows, each.segments, len(self.moments)).bytes
            for each in self.taken.values()
        )

    def _keep(self, number: int, flowing: Flowing) -> None:
        call = self._calls.get(flowing.key) or self._call(number, flowing.key)
        moment = self._moment(flowing.instant)
        if moment != self._at:
            self._at = moment
            self._choices.clear()
            self._drawn.clear()
        choice = self._choices.get(call.choice)
        if choice is None:
            choice = self._choices[call.choice] = self._choose(number, call, flowing, moment)
        if not len(choice.keys):
            return
        site = self.taken.get(flowing.site.name) or self._site(number, flowing)
        kept = self.sink.put(
            site.number,
            flowing.x,
            choice.places,
            choice.keys,
            minus=flowing.minus,
            groups=choice.groups,
        )
        site.rows += kept
        site.segments += len(flowing.branches)

    def _call(self, number: int, kept: "Selection") -> _Call:
        rows = torch.tensor(kept.rows, dtype=torch.int32) + self._offset
        branches = [self._branch(name) for name in kept.branches]
        alike = (
            number,
            kept.branches,
            kept.rows,
            tuple(kept.entries),
            kept.tokens.numpy().tobytes(),
            kept.offsets.numpy().tobytes(),
        )
        call = _Call(
            rows.repeat(len(branches)),
            torch.tensor(branches, dtype=torch.int32).repeat_interleave(len(rows)),
            self._alike.setdefault(alike, len(self._alike)),
        )
        self._calls[kept] = call
        return call

    def _choose(self, number: int, call: _Call, flowing: Flowing, moment: int) -> _Choice:
        """The rows of a call that are kept: places in x, and keys."""
        capture, kept = self.captures[number][0], flowing.key
        counts, streams = self._counts(capture, call, flowing, self.moments[moment])
        places, keys = choose(
            kept.tokens,
            kept.offsets,
            kept.index,
            call.samples,
            call.branches,
            streams,
            moment,
            counts,
            shift=flowing.shift,
            checked=False,
        )
        if capture.pool == "none":
            return _Choice(places, keys, None)
        have = kept.offsets.diff() if counts is None else counts.minimum(kept.offsets.diff())
        ends = have[have > 0].cumsum(0)
        groups = torch.cat([ends.new_zeros(1), ends]).int()
        keys = keys[groups[:-1].long()]
        keys[:, 3] = POOLED
        return _Choice(places, keys, groups)

    def _counts(
        self, capture: Capture, call: _Call, flowing: Flowing, at: Moment
    ) -> tuple[Int32[Tensor, " entries"] | None, Int64[Tensor, " entries"]]:
        """How many tokens of each entry are kept, None for all; and the entries' random streams."""
        tokens = capture.tokens if isinstance(capture.tokens, Choice) else Choice.model_construct()
        if tokens.random is not None:
            have = flowing.offsets.diff()
            if isinstance(tokens.random, int):
                counts = have.clamp(max=tokens.random)
            else:
                counts = (have * tokens.random).round().clamp(min=1)
        elif tokens.budget is not None:
            moments, moment = flowing.moments, flowing.moment
            if moments is None or moment is None:
                moments, moment = self.calls, 0
            if moments is None:
                raise InvalidInput(
                    f"{flowing.site.name}: a budget of tokens needs to know how many steps come; "
                    "take random: for generated text"
                )
            whole = self._streams(call, flowing.branches, -1, 0)
            counts = counts_of_budget(tokens.budget, moments, moment, whole)
        else:
            return None, call.samples.long()  # nothing is drawn
        return counts.int(), self._streams(call, flowing.branches, at.step, at.evaluation)

    def _streams(
        self, call: _Call, branches: tuple[str, ...], step: int, evaluation: int
    ) -> Int64[Tensor, " entries"]:
        """A seed for each entry, by its sample and branch and the moment, whatever its batch is."""
        samples = call.samples[: len(call.samples) // len(branches)].numpy()
        key = (samples.tobytes(), branches, step, evaluation)
        if key not in self._drawn:
            numbers = samples.astype(np.int64) + self._first
            found = [streams_of(self.seed, numbers, step, evaluation, name) for name in branches]
            self._drawn[key] = torch.from_numpy(np.concatenate(found))
        return self._drawn[key]

    def _site(self, number: int, flowing: Flowing) -> Taken:
        capture, x, name = self.captures[number][0], flowing.x, flowing.site.name
        stored = capture.stored(x.dtype)
        if stored not in STORED:
            raise InvalidInput(
                f"{name}: the model has {str(x.dtype).removeprefix('torch.')}, which a store does "
                "not hold; give the capture a dtype"
            )
        layout = SiteLayout(
            name, x.shape[2], stored, x.dtype, flowing.site.heads, flowing.hw, capture.pool
        )
        self.taken[name] = Taken(layout, self.sink.site(layout))
        return self.taken[name]

    def _moment(self, instant: "StepInfo | None") -> int:
        at = (-1, 0) if instant is None else (instant.step, instant.evaluation)
        number = self._numbers.get(at)
        if number is None:
            number = self._numbers[at] = len(self.moments)
            self.moments.append(OUTSIDE if instant is None else _moment_of(instant))
        return number

    def _branch(self, name: str) -> int:
        if name not in self.branches:
            self.branches.append(name)
        return self.branches.index(name)


def _moment_of(instant: "StepInfo") -> Moment:
    sigma = np.nan if instant.sigma is None else instant.sigma
    return Moment(instant.step, instant.evaluation, instant.timestep, sigma, instant.fraction)


class Counter:
    """A sink that keeps nothing."""

    def __init__(self) -> None:
        self.sites: list[SiteLayout] = []

    def site(self, layout: SiteLayout) -> int:
        self.sites.append(layout)
        return len(self.sites) - 1

    def put(
        self,
        site: int,
        x: Tensor,
        places: Tensor,
        keys: Tensor,
        *,
        minus: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> int:
        return len(keys)


class NotFinite(Exception):
    """A row that is not finite: its site, and the keys of the row."""

    def __init__(self, site: SiteLayout, key: list[int]):
        super().__init__(site.name)
        self.site = site
        self.key = key


class Finder(Counter):
    """A sink that keeps nothing, and stops at the first row that is not finite.

    Raises:
        NotFinite: at that row.
    """

    def put(
        self,
        site: int,
        x: Tensor,
        places: Tensor,
        keys: Tensor,
        *,
        minus: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> int:
        layout = self.sites[site]
        entry, token = places.long().to(x.device).unbind(1)
        rows = x[entry, token] if minus is None else x[entry, token] - minus[entry, token]
        if layout.stored.is_floating_point and not layout.scaled:
            rows = rows.to(layout.stored)
        bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            row = bad[0] if groups is None else _group_of(groups, bad[0])
            raise NotFinite(layout, keys[row].tolist())
        return len(keys)


def _group_of(groups: Tensor, place: int) -> int:
    return int(torch.searchsorted(groups.long(), place, right=True)) - 1
