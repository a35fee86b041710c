"""Rows of a store as the source of a stitch, read at each call and not before."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dreamreader.artifacts import Artifact
from dreamreader.edits import Donation
from dreamreader.engine import UNTIMED, EditContext
from dreamreader.errors import InvalidInput, MissingFile, UnknownName
from dreamreader.mapping.checks import check_whole
from dreamreader.recording import resample_grid
from dreamreader.store.rows import blocks_of, of_unit
from dreamreader.store.store import Store

Sample = tuple[int, int]  # unit, and number within it


class StoreSite(Artifact, kind="site of a store"):
    """A site in a store as the source of a `Stitch`: rows of one step are in memory at a time.

    A file holds the path of the store, its harvests and the samples, and no rows; it is refused
    where another harvest is at that path.

    Args:
        store: open, with all tokens of the site (or its means, which every token gets). site: of
            it.
        samples: for each row of the run its prompt and seed, or the number of a sample of the
            store; its first samples by default.
        flow: whether the store's sigmas are those of flow matching, for maps that depend on noise.

    Raises:
        UnknownName: the store has no such site.
        InvalidInput: it has no such sample; at the run, no such step, branch or token.

    Example:
        >>> source = StoreSite(store, "unet.mid_block", [("a red star", 0)])   # doctest: +SKIP
        >>> edit = Stitch("unet.mid_block", source, ridge)                     # doctest: +SKIP
    """

    def __init__(
        self,
        store: Store,
        site: str,
        samples: Sequence[tuple[str, int] | int] | None = None,
        flow: bool = False,
    ):
        if not isinstance(store, Store):
            raise InvalidInput(
                f"StoreSite: an open store is needed, got {type(store).__name__}; Store(path) "
                "opens one"
            )
        if site not in store.sites:
            raise UnknownName("site of the store", site, store.sites)
        self.store, self.site, self.flow = store, site, bool(flow)
        self.samples = None if samples is None else [_plain(each) for each in samples]
        self._found = _samples_of(store)
        self._numbers = {key: number for number, (key, _) in enumerate(self._found)}
        chosen = range(len(self._found)) if self.samples is None else self.samples
        self._places: list[Sample] = [self._place(each) for each in chosen]

    def donate(self, place: EditContext) -> Donation:
        """See `dreamreader.edits.StitchSource`."""
        count = len(self._places)
        if count < place.total or (self.samples is not None and count != place.total):
            raise self._error(place, f"it has {count} rows, the run {place.total}; choose samples=")
        own = self._places[place.first : place.first + place.rows]
        instant = place.instant or UNTIMED
        names = place.branches if len(place.branches) > 1 else self._only(place)
        on = place.selected.any(1).expand(place.batch).reshape(len(names), -1).any(1).tolist()
        levels: set[float] = set()
        parts = {
            number: self._read(place, name, instant.step, instant.evaluation, own, levels)
            for number, name in enumerate(names)
            if on[number]
        }
        layout = self.store.sites[self.site]
        width = max((len(tokens) for part in parts.values() for _, tokens in part), default=1)
        values = torch.zeros(len(own), len(names), width, layout.width)
        positions = torch.full((len(own), width), -1)
        for branch, part in parts.items():
            for row, (found, tokens) in enumerate(part):
                values[row, branch, : len(tokens)] = found
                positions[row, : len(tokens)] = tokens
        level = next(iter(levels), math.nan)
        given = Donation(values, level=None if math.isnan(level) else level)
        if layout.pool != "none":  # one row, which every token gets
            return given
        if place.own is not None:
            return replace(given, positions=positions)
        whole = width if layout.hw is None else layout.hw[0] * layout.hw[1]
        if parts and (width != whole or bool((positions != torch.arange(width)).any())):
            raise self._error(place, f"it holds only some tokens of {self.site}; harvest all")
        if parts and layout.hw is not None and place.hw is not None:
            return replace(given, values=resample_grid(values, layout.hw, place.hw))
        return given

    def to_file(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Where the store is, and what it is."""
        samples = None if self.samples is None else [
            list(each) if isinstance(each, tuple) else each for each in self.samples
        ]  # fmt: skip
        content = {"site": self.site, "samples": samples, "flow": self.flow}
        return {}, {"store": str(self.store.path.absolute()), "runs": self._runs(), **content}

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Self:
        path = Path(content["store"])
        if not path.is_dir():
            raise MissingFile(path)
        samples = content["samples"]
        if samples is not None:
            samples = [tuple(each) if isinstance(each, list) else each for each in samples]
        made = cls(Store(path), content["site"], samples, content["flow"])
        if made._runs() != content["runs"]:
            raise InvalidInput(
                f"{path} holds another harvest than the one that is meant: "
                f"{', '.join(each[:12] for each in made._runs())}, not "
                f"{', '.join(each[:12] for each in content['runs'])}"
            )
        return made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StoreSite):
            return NotImplemented
        return self.to_file() == other.to_file()

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"StoreSite({str(self.store.path)!r}, {self.site!r}: {len(self._places)} rows)"

    def _runs(self) -> list[str]:
        return [job.run for job in self.store.manifest.jobs]

    def _place(self, sample: tuple[str, int] | int) -> Sample:
        number = self._numbers.get(sample) if isinstance(sample, tuple) else sample
        if number is None or not 0 <= number < len(self._found):
            raise InvalidInput(
                f"{self.store.path} has no sample {sample!r}; it has {len(self._found)}, the first "
                f"is {self._found[0][0] if self._found else None!r}"
            )
        return self._found[number][1]

    def _only(self, place: EditContext) -> tuple[str, ...]:
        """The branch of a call with one, whatever a store with one calls it."""
        known = self.store.branches
        return place.branches if place.branches[0] in known or len(known) != 1 else (known[0],)

    def _read(
        self,
        place: EditContext,
        branch: str,
        step: int,
        evaluation: int,
        own: Sequence[Sample],
        levels: set[float],
    ) -> list[tuple[Tensor, Tensor]]:
        """Values and tokens of each row at a moment, in the order of its tokens."""
        found: dict[Sample, list[tuple[Tensor, np.ndarray]]] = {}
        if branch in self.store.branches:
            segments = self.store.segments(self.site, steps=[step], branch=branch)
            for unit in sorted({unit for unit, _ in own}):
                for block in blocks_of(of_unit(segments, unit)):
                    values, keys, at = block.values, block.keys, block.times()
                    here = np.asarray(at["evaluation"]) == evaluation
                    levels |= {_level(each, self.flow) for each in np.asarray(at["sigma"])[here]}
                    for sample in {sample for n, sample in own if n == unit}:
                        rows = np.flatnonzero(here & (keys[:, 0] == sample))
                        if len(rows):
                            some = values[torch.from_numpy(rows)].float(), keys[rows, 3]
                            found.setdefault((unit, sample), []).append(some)
        if not all(each in found for each in own):
            had = ", ".join(map(str, self.store.steps))
            raise self._error(
                place,
                f"it has no rows at step {step} in the branch {branch!r}; its steps are {had}, its "
                f"branches {', '.join(self.store.branches)}; limit the edit with steps and branch",
            )
        joined = {key: _in_order(parts) for key, parts in found.items()}
        return [joined[each] for each in own]

    def _error(self, place: EditContext, text: str) -> InvalidInput:
        return InvalidInput(f"Stitch at {place.site}, from {self.store.path}: {text}")


def _in_order(parts: Sequence[tuple[Tensor, np.ndarray]]) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(np.concatenate([each for _, each in parts]).astype(np.int64))
    order = tokens.argsort()
    return torch.cat([each for each, _ in parts])[order], tokens[order]


def _level(sigma: float, flow: bool) -> float:
    """The ratio of noise to signal; NaN where the scheduler says no sigma."""
    if not flow or math.isnan(sigma):
        return float(sigma)
    return float(sigma / (1 - sigma)) if sigma < 1 else math.inf


def _plain(sample: Any) -> tuple[str, int] | int:
    """A prompt with its seed, or a number."""
    if isinstance(sample, str) or not isinstance(sample, Sequence):
        return check_whole("StoreSite: a sample is a prompt with its seed, or a number; it", sample)
    if len(sample) != 2 or not isinstance(sample[0], str):
        raise InvalidInput(f"StoreSite: a sample is (prompt, seed) or a number, got {sample!r}")
    return sample[0], check_whole("StoreSite: a seed", sample[1])


def _samples_of(store: Store) -> list[tuple[tuple[str, int], Sample]]:
    """Prompt and seed of every sample, with its place."""
    found = []
    for unit in store.units:
        table = store.samples(unit)
        keys = zip(table["prompt"].to_pylist(), table["seed"].to_pylist(), strict=True)
        found += [(key, (unit, number)) for number, key in enumerate(keys)]
    return found
