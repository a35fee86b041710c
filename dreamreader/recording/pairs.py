"""Activations of paired prompts at several sites, on one trajectory or each on its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dreamreader._progress import part_of, show_progress
from dreamreader.engine import Reader, Record, StepInfo, ranges, tokenize
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.recording.buffer import MEMORY, ActivationBuffer
from dreamreader.recording.calls import Calls, record_calls, row_seeds
from dreamreader.recording.grids import resample_grid

TRAJECTORIES = ("base", "teacher", "own")
Grid = tuple[int, int] | None


@dataclass(eq=False)
class Pairs:
    """Activations of pairs of rows: what the base has, and what the teacher has instead.

    Both come from one model with two prompts (`record_pairs`), or from two models
    (`record_between`): then the base is the source model's side, the teacher the target model's,
    sites have the names of their own model, and features are as many as each has.

    Attributes:
        base, teacher: by site, [rows, calls, tokens, features].
        steps: the scheduler's step of each call of the base; None where there are no steps.
        counts: by site, [rows] how many tokens a row has, the first ones; all where None.
        positions: of two models, of the base and of the teacher: int64 [rows, tokens], the index
            among the row's own tokens of what stands at each place (of several, the last), -1
            behind the count. None where places are those of the recording, or means.
        times: of the base and of the teacher: the time of each call.
        levels: ratio of noise to signal at each call of the teacher, where it is known.
        groups: int64 [rows]: rows of one prompt have one number.
        grids: of the base and of the teacher, by site: height and width of the grid that tokens of
            the picture are, None of others.
        unpaired: what has no partner and was left out, by name: `source tokens`, `target calls`.
    """

    base: dict[str, Tensor]
    teacher: dict[str, Tensor]
    steps: tuple[int, ...] | None
    counts: dict[str, Tensor] | None = None
    positions: tuple[Tensor, Tensor] | None = None
    times: tuple[tuple[StepInfo, ...], tuple[StepInfo, ...]] | None = None
    levels: tuple[float, ...] | None = None
    groups: Tensor | None = None
    grids: tuple[dict[str, Grid], dict[str, Grid]] | None = None
    unpaired: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if not self.base or not self.teacher:
            site, values = next(iter([*self.base.items(), *self.teacher.items()]), ("", None))
            has = "nothing" if values is None else str(list(values.shape))
            sides = ("nothing", has) if not self.base else (has, "nothing")
            raise InvalidInput(
                f"{site}: pairs need equal shapes, base {sides[0]}, teacher {sides[1]}"
            )
        wanted = next(iter(self.base.values())).shape[:2]
        for site, values in [*self.base.items(), *self.teacher.items()]:
            if values.shape[:2] != wanted:
                raise InvalidInput(
                    f"{site}: pairs need as many rows and calls at every site, got "
                    f"{list(values.shape[:2])} and {list(wanted)}"
                )

    @property
    def source(self) -> dict[str, Tensor]:
        """The base, as mappings from model to model call it."""
        return self.base

    @property
    def target(self) -> dict[str, Tensor]:
        """The teacher, as mappings from model to model call it."""
        return self.teacher

    def few(self, count: int, start: int = 0) -> "Pairs":
        """Some of the rows, as views."""
        part = slice(start, start + count)
        one, other = (
            {site: each[part] for site, each in side.items()} for side in (self.base, self.teacher)
        )
        counts, positions, groups = self.counts, self.positions, self.groups
        return replace(
            self,
            base=one,
            teacher=other,
            counts=None if counts is None else {site: each[part] for site, each in counts.items()},
            positions=None if positions is None else (positions[0][part], positions[1][part]),
            groups=None if groups is None else groups[part],
        )

    def values_at(self, source: str, target: str, resample: str = "area") -> tuple[Tensor, Tensor]:
        """A site of each side, token by token: [rows, calls, tokens, features] of both.

        Where their grids differ, the source is brought to the grid of the target.

        Args:
            source, target: sites. resample: see `resample_grid`.

        Raises:
            UnknownName: a side has no such site.
            InvalidInput: they have other numbers of tokens whose places are not known, or grids of
                another shape.
        """
        for side, values, site in (
            ("source", self.source, source),
            ("target", self.target, target),
        ):
            if site not in values:
                raise UnknownName(f"{side} site of pairs", site, values)
        x, y = self.source[source], self.target[target]
        grids = ({}, {}) if self.grids is None else self.grids
        one, other = grids[0].get(source), grids[1].get(target)
        if one is not None and other is not None:
            return resample_grid(x, one, other, resample), y
        if x.shape[2] != y.shape[2] or one != other:
            raise InvalidInput(
                f"{source} has {_size(x, one)} and {target} {_size(y, other)}: they do not belong "
                "together one by one"
            )
        return x, y

    def check_same_sites(self) -> None:
        """Refuse sides that cannot be subtracted.

        Raises:
            InvalidInput: the teacher lacks a site of the base, or has it in another shape.
        """
        for site, values in self.base.items():
            other = self.teacher.get(site)
            if other is None or other.shape != values.shape:
                got = "nothing" if other is None else str(list(other.shape))
                raise InvalidInput(
                    f"{site}: pairs need equal shapes, base {list(values.shape)}, teacher {got}"
                )

    @property
    def rows(self) -> int:
        return len(next(iter(self.base.values())))

    @property
    def calls(self) -> int:
        return next(iter(self.base.values())).shape[1]

    def token_weights(self, site: str, rows: Tensor) -> Tensor:
        """[rows, tokens] float64: 1 / count at each of a row's tokens, 0 behind them."""
        tokens = self.base[site].shape[2]
        count = torch.full((len(rows),), tokens)
        if self.counts is not None:
            count = self.counts[site][rows]
        count = count.unsqueeze(1)
        return (torch.arange(tokens) < count) / count.double()


def record_pairs(
    reader: Reader,
    base: Sequence[str],
    teacher: Sequence[str],
    sites: str | Sequence[str],
    *,
    seeds: int | Sequence[int] = 0,
    trajectory: str = "base",
    branch: str = "cond",
    tokens: Any = None,
    batch_size: int = 16,
    memory: int = MEMORY,
    **arguments: Any,
) -> Pairs:
    """Runs pairs of prompts and records the activations of both at the same places.

    In a language model token i of the base belongs to token i of the teacher; where `tokens` are
    chosen, the first of them to the first, and so on.

    Args:
        reader: of a pipeline or language model.
        base, teacher: prompts; row i of the teacher belongs to row i of the base.
        sites: site strings, all in the denoiser, or all outside of it.
        seeds: of the rows; both prompts of a pair have the same.
        trajectory: of the latents that the denoiser sees. `base` and `teacher`: that of one prompt
            for both, so that a pair differs in the prompt alone; `own`: each its own, which drift
            apart with the steps.
        branch: guidance branch.
        tokens: which tokens are recorded, as in `Record`; as many in all prompts.
        batch_size: rows computed together.
        memory: bytes of activations above which they go to a file without a name, in bfloat16.
        arguments: of the run, its `progress` too.

    Raises:
        InvalidInput: the prompts are not as many, or a base has more tokens than its teacher where
            all are recorded.
        UnknownName: there is no such trajectory, site or branch.
    """
    base, teacher = list(base), list(teacher)
    check_pairs(base, teacher)
    if trajectory not in TRAJECTORIES:
        raise UnknownName("trajectory", trajectory, TRAJECTORIES)
    listed = [sites] if isinstance(sites, str) else list(sites)
    names = [name for each in listed for name in reader.sites(each).names]
    numbers = row_seeds(seeds, len(base))
    if not in_denoiser(reader, names):
        width = _longest(reader, base, teacher, tokens)
        records = [Record(name, tokens=tokens, branch="cond") for name in names]
        first, second = (
            outside(reader, prompts, records, numbers, batch_size, memory, width, arguments)
            for prompts in (base, teacher)
        )
        counts = None if width is None else first.counts
        if counts is not None:
            _check_counts(counts, second.counts)
        found = Pairs(first.values, second.values, None, counts)
        found.check_same_sites()
        return found
    one, other = (
        record_calls(reader, each, seeds=numbers, branch=branch, batch_size=batch_size, **arguments)
        for each in (base, teacher)
    )
    return pairs_of_calls(
        reader, one, other, names, trajectory=trajectory, tokens=tokens, memory=memory
    )


def pairs_of_calls(
    reader: Reader,
    base: Calls,
    teacher: Calls,
    sites: Sequence[str],
    *,
    trajectory: str = "base",
    tokens: Any = None,
    batch_size: int = 32,
    memory: int = MEMORY,
) -> Pairs:
    """`record_pairs` from recorded calls of both prompts."""
    latents = {"base": (base, base), "teacher": (teacher, teacher), "own": (base, teacher)}
    records = [Record(site, tokens=tokens) for site in sites]
    first, second = (
        replay_calls(reader, calls, along.latents, records, batch_size, memory).values
        for calls, along in zip((base, teacher), latents[trajectory], strict=True)
    )
    found = Pairs(first, second, tuple(each.step for each in base.moments))
    found.check_same_sites()
    return found


def check_pairs(base: Sequence[str], teacher: Sequence[str]) -> None:
    """Refuse pairs without a partner.

    Raises:
        InvalidInput: the lists are empty or of different lengths.
    """
    if not base or len(base) != len(teacher):
        raise InvalidInput(
            f"pairs need as many teacher prompts as base prompts, at least one; got {len(base)} "
            f"base and {len(teacher)} teacher prompts"
        )


def check_prompts(*prompts: Any, batch_size: Any) -> None:
    """Refuse what are no prompts, and batches of nothing.

    Raises:
        InvalidInput: a list of prompts is one string or empty; a batch has no row.
    """
    for listed in prompts:
        if isinstance(listed, str):
            raise InvalidInput(f"prompts is a list of strings, got {listed!r}; give [{listed!r}]")
        if not len(listed):
            raise InvalidInput("prompts is a list of strings, got an empty one")
    if type(batch_size) is not int or batch_size < 1:
        raise InvalidInput(f"batch_size is a whole number of at least 1, got {batch_size!r}")


def in_denoiser(reader: Reader, names: Sequence[str]) -> bool:
    """Whether sites are in the denoiser of a pipeline.

    Raises:
        InvalidInput: only some of them are.
    """
    denoisers = reader.denoisers
    inside = [name for name in names if name.split(".")[0].split(":")[0] in denoisers]
    if inside and len(inside) < len(names):
        outside = next(name for name in names if name not in inside)
        raise InvalidInput(
            f"{inside[0]} is in the denoiser and {outside} is not: record them apart"
        )
    return bool(inside)


def both_in_denoiser(one: tuple[Reader, Sequence[str]], two: tuple[Reader, Sequence[str]]) -> bool:
    """Whether the sites of two readers are in their denoisers.

    Raises:
        InvalidInput: those of one are, and those of the other are not.
    """
    inside = [in_denoiser(reader, names) for reader, names in (one, two)]
    if inside[0] != inside[1]:
        (_, called), (_, once) = (one, two) if inside[0] else (two, one)
        raise InvalidInput(
            f"{called[0]} is in a denoiser, which is called at every step, and {once[0]} is not: "
            "their calls have no partners"
        )
    return inside[0]


def replay_calls(
    reader: Reader,
    calls: Calls,
    latents: Tensor,
    records: Sequence[Record],
    batch_size: int,
    memory: int,
    numbers: Sequence[int] | None = None,
) -> ActivationBuffer:
    """Activations of calls with given latents, by site [rows, calls, tokens, features].

    Args:
        calls: that are made again. latents: [rows, calls, ...]. records: of one branch.
        numbers: which calls the latents are for; all by default.
    """
    rows, count = latents.shape[:2]
    of_calls = torch.arange(count) if numbers is None else torch.tensor(numbers)
    buffer = ActivationBuffer(rows * count, memory)
    for chosen in torch.arange(rows * count).split(batch_size):
        row, call = chosen // count, chosen % count
        with reader.recording(records) as cache, torch.no_grad():
            calls(row, of_calls[call], latents[row, call])
        buffer.put(chosen, cache)
    buffer.values = {site: each.unflatten(0, (rows, count)) for site, each in buffer.values.items()}
    return buffer


def outside(
    reader: Reader,
    prompts: Sequence[str],
    records: Sequence[Record],
    seeds: Sequence[int],
    batch_size: int,
    memory: int,
    width: int | None,
    arguments: dict[str, Any],
) -> ActivationBuffer:
    """Activations of prompts outside a denoiser, by site [rows, 1, tokens, features]."""
    buffer = ActivationBuffer(len(prompts), memory, width)
    asked: dict[str, Any] = {"progress": True} | arguments
    if reader.kind == "pipeline":
        asked |= {"num_inference_steps": 1, "output_type": "latent"}
    with show_progress(asked.pop("progress")) as report:
        for chosen in torch.arange(len(prompts)).split(batch_size):
            part = slice(int(chosen[0]), int(chosen[-1]) + 1)
            own = {"seeds": seeds[part], "progress": part_of(report, part.start, len(prompts))}
            buffer.put(chosen, reader.run(prompts[part], record=records, **own, **asked).cache)
    buffer.values = {site: value.unsqueeze(1) for site, value in buffer.values.items()}
    return buffer


def _longest(
    reader: Reader, base: Sequence[str], teacher: Sequence[str], tokens: Any
) -> int | None:
    """Tokens of the longest prompt, where all are recorded and some prompts have fewer."""
    if reader.kind != "language" or tokens is not None:
        return None
    counts = list(map(len, tokenize(reader, [*base, *teacher])[0]))
    return max(counts) if min(counts) < max(counts) else None


def _size(values: Tensor, grid: Grid) -> str:
    return f"{values.shape[2]} tokens" if grid is None else f"a grid of {grid[0]} x {grid[1]}"


def number_prompts(prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
    """[rows]: the same number where prompt and target prompt are the same."""
    seen: dict[tuple[str, str], int] = {}
    both = zip(map(str, prompts), map(str, targets), strict=True)
    return torch.tensor([seen.setdefault(each, len(seen)) for each in both])


def _check_counts(base: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
    """Refuse a token of the base that the teacher has not."""
    for site, counts in base.items():
        lacking = (counts > teacher[site]).nonzero().flatten().tolist()
        if lacking:
            row = lacking[0]
            had, has = int(counts[row]), int(teacher[site][row])
            raise InvalidInput(
                f"pair {row} at {site}: tokens {ranges(range(has, had))} of the base have none in "
                f"the teacher, which has {has} tokens; choose as many of each with tokens="
            )
