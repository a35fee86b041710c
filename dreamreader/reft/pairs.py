"""Activations of paired prompts at several sites, on one trajectory or each on its own."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamreader.engine import Cache, Reader, Record
from dreamreader.engine.firing import ranges
from dreamreader.engine.prompts import tokenize
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.reft.calls import Calls, record_calls, row_seeds

TRAJECTORIES = ("base", "teacher", "own")
MEMORY = 4 << 30


@dataclass(eq=False)
class Pairs:
    """Activations of pairs of prompts: what the base has, and what the teacher has instead.

    Attributes:
        base, teacher: by site, [rows, calls, tokens, features].
        steps: the scheduler's step of each call; None where there are no steps.
        counts: by site, [rows] how many tokens a row has, the first ones; all where None.
    """

    base: dict[str, Tensor]
    teacher: dict[str, Tensor]
    steps: tuple[int, ...] | None
    counts: dict[str, Tensor] | None = None

    def __post_init__(self):
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
        arguments: of the run.

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
    if not _in_denoiser(reader, names):
        width = _longest(reader, base, teacher, tokens)
        first, second = (
            _outside(reader, prompts, names, numbers, tokens, batch_size, memory, width, arguments)
            for prompts in (base, teacher)
        )
        counts = None if width is None else first.counts
        if counts is not None:
            _check_counts(counts, second.counts)
        return Pairs(first.values, second.values, None, counts)
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
    first, second = (
        _replayed(reader, calls, along.latents, sites, tokens, batch_size, memory)
        for calls, along in zip((base, teacher), latents[trajectory], strict=True)
    )
    return Pairs(first, second, tuple(each.step for each in base.moments))


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


def _in_denoiser(reader: Reader, names: Sequence[str]) -> bool:
    from dreamreader.engine.clock import Clock

    if reader._subject.kind != "pipeline":
        return False
    denoisers = set(Clock(reader.subject).denoisers)
    inside = [name for name in names if name.split(".")[0].split(":")[0] in denoisers]
    if inside and len(inside) < len(names):
        outside = next(name for name in names if name not in inside)
        raise InvalidInput(
            f"{inside[0]} is in the denoiser and {outside} is not: record them apart"
        )
    return bool(inside)


def _replayed(
    reader: Reader,
    calls: Calls,
    latents: Tensor,
    sites: Sequence[str],
    tokens: Any,
    batch_size: int,
    memory: int,
) -> dict[str, Tensor]:
    """Activations of calls with given latents, by site [rows, calls, tokens, features]."""
    rows, count = latents.shape[:2]
    shelf = _Shelf(rows * count, memory)
    for chosen in torch.arange(rows * count).split(batch_size):
        row, call = chosen // count, chosen % count
        with reader.recording(sites, tokens=tokens) as cache, torch.no_grad():
            calls(row, call, latents[row, call])
        shelf.put(chosen, cache)
    return {site: value.unflatten(0, (rows, count)) for site, value in shelf.values.items()}


def _outside(
    reader: Reader,
    prompts: Sequence[str],
    names: Sequence[str],
    seeds: Sequence[int],
    tokens: Any,
    batch_size: int,
    memory: int,
    width: int | None,
    arguments: dict[str, Any],
) -> "_Shelf":
    """Activations of prompts outside a denoiser, by site [rows, 1, tokens, features]."""
    shelf = _Shelf(len(prompts), memory, width)
    asked = dict(arguments)
    if reader._subject.kind == "pipeline":
        asked |= {"num_inference_steps": 1, "output_type": "latent"}
    records = [Record(name, tokens=tokens, branch="cond") for name in names]
    for chosen in torch.arange(len(prompts)).split(batch_size):
        part = slice(int(chosen[0]), int(chosen[-1]) + 1)
        shelf.put(
            chosen, reader.run(prompts[part], record=records, seeds=seeds[part], **asked).cache
        )
    shelf.values = {site: value.unsqueeze(1) for site, value in shelf.values.items()}
    return shelf


def _longest(
    reader: Reader, base: Sequence[str], teacher: Sequence[str], tokens: Any
) -> int | None:
    """Tokens of the longest prompt, where all are recorded and some prompts have fewer."""
    if reader._subject.kind != "language" or tokens is not None:
        return None
    counts = list(map(len, tokenize(reader, [*base, *teacher])[0]))
    return max(counts) if min(counts) < max(counts) else None


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


class _Shelf:
    """Rows of several sites, in memory or, where they are many, in a file.

    Args:
        width: tokens of a row, where rows have different numbers: then they begin with their first
            and end with zeros.

    Attributes:
        counts: by site, [rows] own tokens of each row, where there is a width.
    """

    def __init__(self, count: int, memory: int, width: int | None = None):
        self.count = count
        self.memory = memory
        self.width = width
        self.values: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def put(self, rows: Tensor, cache: Cache) -> None:
        found = {site: _plain(each.tensor, each.heads) for site, each in cache.items()}
        if self.width is not None:
            for site, each in cache.items():
                found[site] = self._aligned(site, found[site], each.positions)
                counts = self.counts.setdefault(site, torch.zeros(self.count, dtype=torch.int64))
                assert each.positions is not None
                counts[rows] = (each.positions[:, 0] >= 0).sum(1)
        if not self.values:
            bytes_ = sum(each[0].numel() * each.element_size() for each in found.values())
            make = _in_file if 2 * bytes_ * self.count > self.memory else torch.empty
            self.values = {site: _made(make, self.count, each) for site, each in found.items()}
        for site, value in found.items():
            if value.shape[1:] != self.values[site].shape[1:]:
                raise InvalidInput(
                    f"{site}: has {list(value.shape[1:])} values, before "
                    f"{list(self.values[site].shape[1:])}: the prompts have different numbers of "
                    "tokens; choose as many of each with tokens="
                )
            self.values[site][rows] = value.to(self.values[site].dtype)

    def _aligned(self, site: str, values: Tensor, positions: Tensor | None) -> Tensor:
        """[rows, width, features] with each token at its own index, without padding."""
        assert self.width is not None
        if positions is None or values.dim() != 3 or int(positions.max()) >= self.width:
            raise InvalidInput(
                f"{site}: which tokens of prompts of different length belong together is unknown; "
                "choose as many of each with tokens="
            )
        own = positions[:, 0]
        out = values.new_zeros(len(values), self.width, values.shape[2])
        row, column = (own >= 0).nonzero(as_tuple=True)
        out[row, own[row, column]] = values[row, column]
        return out


def _made(make: Callable[..., Tensor], count: int, like: Tensor) -> Tensor:
    return make((count, *like.shape[1:]), dtype=like.dtype)


def _in_file(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file without a name: its space is free again when the tensor is gone."""
    size = torch.Size(shape).numel()
    handle, path = tempfile.mkstemp(suffix=".activations")
    os.close(handle)
    try:
        flat = torch.from_file(path, shared=True, size=size, dtype=torch.bfloat16)
    finally:
        os.unlink(path)
    return flat.reshape(shape)


def _plain(tensor: Tensor, heads: int | None) -> Tensor:
    """[rows, tokens, features] of a recording with one step."""
    flat = tensor.flatten(-2) if heads else tensor
    return flat.squeeze(1)
