"""Keeps what a recording asks for: exact copies in the canonical layout, bounded in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dreamreader.engine._cache import Activation, RunRow
from dreamreader.engine._call_context import CallContext
from dreamreader.engine._clock_schedule import UNTIMED, StepInfo
from dreamreader.engine._recorded import join_rows
from dreamreader.engine._request import Record
from dreamreader.engine._resolved import Selection
from dreamreader.errors import ClockUnknown, InvalidInput


class Memory:
    """Bytes that the recordings of one session hold, and how many they may."""

    def __init__(self, limit: int | None):
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if limit is not None and not (number and limit >= 0):
            raise InvalidInput(f"memory_limit is a number of bytes, got {limit!r}")
        self.limit = available_memory() if limit is None else limit
        self.held = 0

    def add(self, count: int, name: str) -> None:
        self.held += count
        if self.held > self.limit:
            raise InvalidInput(
                f"recording {name}: {self.held / 2**30:.2f} GiB are held and "
                f"{self.limit / 2**30:.2f} GiB allowed; record fewer steps, tokens or sites, give "
                "Record(dtype=torch.bfloat16) or a reduce function, or raise memory_limit"
            )

    def expect(self, count: int, moments: int, name: str) -> None:
        """Refuse at the first value what the whole run will not fit."""
        if self.held + count * moments > self.limit:
            raise InvalidInput(
                f"recording {name}: {moments} steps of {count / 2**20:.1f} MiB need "
                f"{count * moments / 2**30:.2f} GiB, {(self.limit - self.held) / 2**30:.2f} GiB "
                "are left; record fewer steps, tokens or sites, give Record(dtype=torch.bfloat16) "
                "or a reduce function, or raise memory_limit"
            )


class _PieceBlock:
    """Memory for the pieces of several moments, [rows, branches, moments, ...], filled in order.

    Pieces are written where the finished recording has them, so that nothing is copied twice.
    """

    __slots__ = (
        *("branches", "moments", "piece_bytes", "rows", "used"),
        *("_device", "_dtype", "_given", "_places", "_shape", "_to"),
    )

    def __init__(self, x: Tensor, held: Selection, moments: int, request: Record, piece_bytes: int):
        self.branches = held.branches
        self.rows = len(held.rows)
        self.moments = moments if moments > 1 else 1
        self.piece_bytes = piece_bytes
        self.used = 0
        self._given = x.shape
        self._device = x.device if request.device is None else request.device
        self._dtype = request.dtype or x.dtype
        self._shape: tuple[int, ...] = ()
        self._to: Tensor | None = None  # one piece is a copy as it is
        if len(held.branches) > 1 or self.moments > 1:
            self._shape = (len(held.branches), self.rows, *x.shape[1:])
            shape = (self.rows, len(held.branches), self.moments, *x.shape[1:])
            empty = torch.empty(shape, dtype=self._dtype, device=self._device)
            self._to = empty.transpose(0, 1)
            # In pieces from the start: to cut one out at each call takes as long as its copy.
            one = len(held.branches) == 1
            self._places = self._to[0].unbind(1) if one else self._to.unbind(2)

    @property
    def memory(self) -> Tensor:
        """[rows, branches, moments, ...]."""
        assert self._to is not None
        if not self._shape:
            return self._to.unsqueeze(1).unsqueeze(1)
        return self._to.transpose(0, 1)

    def fits(self, x: Tensor, held: Selection) -> bool:
        """Whether x has its place as the next piece here."""
        return (
            self.used < self.moments
            and x.shape == self._given
            and (held.branches is self.branches or held.branches == self.branches)
            and len(held.rows) == self.rows
        )

    def write(self, x: Tensor) -> None:
        """Copies x [branches * rows, ...] to the next place."""
        if self._to is None:
            self._to = _copy(x, self._device, self._dtype)
        else:
            place = self._places[self.used]
            place.copy_(x if place.shape == x.shape else x.view(self._shape))
        self.used += 1

    def take(self, x: Tensor) -> None:
        """Let x itself, a copy of our own, be the only piece."""
        self._to = x
        self.used += 1

    def piece(self, number: int) -> Tensor:
        """What was written as this piece, [rows, branches, ...]."""
        return self.memory.select(2, number)


Keeper = Callable[[Tensor, CallContext], None]
_Filed = tuple[tuple[str, ...], _PieceBlock, int]  # branches, where their values are

_NEVER = (UNTIMED.step, UNTIMED.evaluation)


@dataclass(eq=False, slots=True)
class _RecordedRun:
    """Values of one run of the subject: a piece for each (step, evaluation) and branches."""

    rows: tuple[int, ...]
    pieces: dict[tuple[int, int], list[_Filed]] = field(default_factory=dict)
    instants: dict[tuple[int, int], StepInfo] = field(default_factory=dict)
    calls: dict[tuple[int, int], tuple[CallContext, Selection]] | None = None  # of texts
    held: Selection | None = None
    blocks: list[_PieceBlock] = field(default_factory=list)


class Recorder:
    """One recording at one site."""

    def __init__(self, request: Record, name: str, number: int, memory: Memory):
        self.request = request
        self.name = name
        self.number = number
        self._memory = memory
        # A run is what was filed of it, or its only value so far with its selection and call.
        self._parts: dict[int, _RecordedRun | tuple[Tensor, Selection, CallContext]] = {}
        self._announced = False

    def keep(self, x: Tensor, held: Selection, now: CallContext, moments: int) -> None:
        """Copy the kept part of x [batch, tokens, features] (or [batch, tokens, heads, d])."""
        if x.requires_grad:
            x = x.detach()
        if held.picked is not None or held.columns is not None:
            x = held.gather(x)
        if held.heads and x.dim() == 3:
            x = x.unflatten(-1, (held.heads, -1))
        if self.request.reduce is not None:
            x = self._reduce(x, held.positions(now))
        if moments < 2 and now.run not in self._parts and len(held.branches) == 1:
            self._parts[now.run] = (self._copy_values(x, moments), held, now)
        else:
            self._file(x, held, now, moments)

    def keeper(self, x: Tensor, held: Selection, moments: int) -> Keeper:
        """`keep` for values of the form of x: its choices are made once."""

        def keep(x: Tensor, now: CallContext) -> None:
            self.keep(x, held, now, moments)

        request, name, memory = self.request, self.name, self._memory
        whole = held.picked is None and held.columns is None and request.reduce is None
        opens = held.heads and x.dim() == 3
        if not whole or opens or not self._announced:
            return keep
        if moments > 1 or len(held.branches) != 1:

            def file(x: Tensor, now: CallContext) -> None:
                self._file(x.detach() if x.requires_grad else x, held, now, moments)

            return file
        device, dtype = request.device, request.dtype or x.dtype
        here = device is None or x.device == torch.device(device)
        size = x.numel() * dtype.itemsize
        is_clone = here and dtype == x.dtype and x.is_contiguous()

        parts = self._parts

        def copy(x: Tensor, now: CallContext) -> None:
            run = now.run
            if run in parts or x.requires_grad:
                return keep(x, now)
            memory.held += size
            if memory.held > memory.limit:
                memory.add(0, name)
            if is_clone:
                parts[run] = (x.clone(), held, now)
            else:
                parts[run] = (_copy(x, device, dtype), held, now)

        return copy

    def _copy_values(self, x: Tensor, moments: int) -> Tensor:
        """A copy in memory of our own: later changes in place must not show."""
        request = self.request
        size = x.nbytes if request.dtype is None else x.numel() * request.dtype.itemsize
        self._count(size, moments)
        return _copy(x, request.device, request.dtype)

    def _count(self, size: int, moments: int) -> None:
        if not self._announced:
            self._announced = True
            self._memory.expect(size, moments, self.name)
        self._memory.add(size, self.name)

    def _file(self, x: Tensor, held: Selection, now: CallContext, moments: int) -> None:
        part = self._open_run(now.run, held)
        filed = self._place(part, held, now)
        block = self._block(part, x, held, moments)
        filed.append((held.branches, block, block.used))
        block.write(x)

    def _open_run(self, run: int, held: Selection | None = None) -> _RecordedRun:
        """A run by its number; its first value is filed once there is another, or at the end."""
        part = self._parts.get(run)
        if isinstance(part, _RecordedRun):
            return part
        if part is None:
            assert held is not None
            opened = self._parts[run] = _RecordedRun(held.rows)
            return opened
        x, held, now = part
        opened = self._parts[run] = _RecordedRun(held.rows)
        block = _PieceBlock(x, held, 1, self.request, x.nbytes)
        block.take(x)
        opened.blocks.append(block)
        self._place(opened, held, now).append((held.branches, block, 0))
        return opened

    def _place(self, part: _RecordedRun, held: Selection, now: CallContext) -> list[_Filed]:
        """Where the value of a call is filed; refuses a second one of the same moment."""
        instant = now.instant if isinstance(now.instant, StepInfo) else UNTIMED
        key = (instant.step, instant.evaluation)
        filed = part.pieces.get(key)
        if filed is None:
            filed = part.pieces[key] = []
        untimed = instant is UNTIMED or _NEVER in part.pieces
        if untimed and len(part.pieces) > 1 or filed:
            before = [each for pieces in part.pieces.values() for each in pieces]
            self._require_new(before if untimed else filed, held, now)
        part.instants[key] = instant
        if held.map is not None:
            part.calls = part.calls or {}
            part.calls[key] = (now, held)
        part.held = held
        return filed

    def _require_new(self, before: list[_Filed], held: Selection, now: CallContext) -> None:
        """Refuse a call at a moment and in branches of which there are values already."""
        if not any(set(branches) & set(held.branches) for branches, *_ in before):
            return
        if isinstance(now.instant, ClockUnknown) and now.phase != "outside":
            raise ClockUnknown(
                f"{self.name} ran more than once, and which step each call is of is unknown. "
                f"{now.instant}"
            )
        raise InvalidInput(
            f"{self.name} ran more than once at {self._moment(now)} with the same rows (a "
            "shared module, VAE tiling or slicing, a prompt in chunks): record a site that "
            "runs once"
        )

    def _block(self, part: _RecordedRun, x: Tensor, held: Selection, moments: int) -> _PieceBlock:
        """Where the next piece goes: a block with room for all the moments that are to come."""
        if not part.blocks or not part.blocks[-1].fits(x, held):
            size = x.numel() * (self.request.dtype or x.dtype).itemsize
            self._count(size, moments)
            part.blocks.append(_PieceBlock(x, held, moments, self.request, size))
        else:
            self._memory.add(part.blocks[-1].piece_bytes, self.name)
        return part.blocks[-1]

    def _moment(self, now: CallContext) -> str:
        return (
            f"step {now.instant.step}" if isinstance(now.instant, StepInfo) else "the same moment"
        )

    def _reduce(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """What `reduce` makes of x; row by row where there is padding, which it never sees."""
        if positions is None or not bool((positions < 0).any()):
            return self._apply_reduce(x)
        real = (positions >= 0).to(x.device)
        parts = [self._apply_reduce(row[None, mask]) for row, mask in zip(x, real, strict=True)]
        if any(each.shape != parts[0].shape for each in parts):
            raise InvalidInput(
                f"recording {self.name}: reduce made {list(parts[0].shape)} of one row and others "
                "of rows of another length; every row needs the same shape"
            )
        return torch.cat(parts)

    def _apply_reduce(self, x: Tensor) -> Tensor:
        assert self.request.reduce is not None
        y = self.request.reduce(x)
        if not isinstance(y, Tensor):
            raise InvalidInput(
                f"recording {self.name}: reduce has to return a tensor, got {type(y).__name__}"
            )
        if y.dim() != x.dim() or y.shape[0] != x.shape[0]:
            raise InvalidInput(
                f"recording {self.name}: reduce made {list(y.shape)} of {list(x.shape)}; rows and "
                "the number of dimensions must stay (keepdim=True)"
            )
        return y

    def activation(self, described: Callable[[int], Sequence[RunRow]]) -> Activation | None:
        """What was recorded, assembled; None where the site never ran. Frees the pieces.

        Args:
            described: the rows of a run, by its number.
        """
        if not self._parts:
            return None
        runs, self._parts = {run: self._open_run(run) for run in self._parts}, {}
        names = self._names(list(runs.values()))
        found = []
        for run, part in runs.items():
            known = {row.index: row for row in described(run)}
            instants = tuple(part.instants[key] for key in part.pieces)
            held, positions = part.held, self._positions(part)
            assert held is not None
            tokens = held.columns
            tensor = self._assemble(part, names, instants)
            found.append(
                Activation(
                    self.name,
                    tensor.squeeze(1) if len(names) == 1 else tensor,
                    tuple(known.get(row, RunRow(row)) for row in part.rows),
                    names,
                    instants,
                    held.grid,
                    held.heads,
                    None if tokens is None or tokens.dim() > 1 else tuple(tokens.tolist()),
                    positions,
                )
            )
        self._require_same_tokens(found)
        return join_rows(found)

    def _require_same_tokens(self, found: Sequence[Activation]) -> None:
        """Refuse runs of which one selection kept different tokens, where nothing tells which."""
        if isinstance(self.request.tokens, str | tuple):
            return  # a word stands where each prompt has it
        first = found[0]
        if any(each.tokens != first.tokens and each.positions is None for each in found):
            raise InvalidInput(
                f"recording {self.name}: the runs in this block keep different tokens "
                f"({first.tokens} and others); record them apart"
            )

    def _positions(self, part: _RecordedRun) -> Tensor | None:
        """[rows, steps, tokens] own index of the tokens of one part, as far as there is one."""
        if self.request.reduce is not None:
            return None  # what it made is no token of the row any more
        found = [held.positions(now) for now, held in (part.calls or {}).values()]
        part.calls = None
        if not found or any(each is None or each.shape != found[0].shape for each in found):  # pyright: ignore
            return None
        return torch.stack(found, 1)  # pyright: ignore[reportArgumentType]

    def _names(self, parts: list[_RecordedRun]) -> tuple[str, ...]:
        """Branches of the runs; every part has to have the same steps."""
        names: dict[str, None] = {}
        for filed in parts[0].pieces.values():
            for branches, *_ in filed:
                names.update(dict.fromkeys(branches))
        for part in parts:
            if part.pieces.keys() != parts[0].pieces.keys():
                raise InvalidInput(
                    f"recording {self.name}: the runs in this block have different steps "
                    f"({len(parts[0].pieces)} and {len(part.pieces)}); record them apart"
                )
        return tuple(names)

    def _assemble(
        self, part: _RecordedRun, names: tuple[str, ...], instants: tuple[StepInfo, ...]
    ) -> Tensor:
        """[rows, branches, steps, tokens, ...] of one part: its only block, or several in one."""
        blocks, part.blocks = part.blocks, []
        only = blocks[0]
        if len(blocks) == 1 and only.branches == names and only.used == only.moments:
            part.pieces.clear()
            return only.memory
        del blocks, only
        _, block, at = next(iter(part.pieces.values()))[0]
        first = block.piece(at)
        count = len(part.rows)
        out: Tensor | None = None
        for number, instant in enumerate(instants):
            filed = part.pieces.pop((instant.step, instant.evaluation))
            have = [name for branches, *_ in filed for name in branches]
            if set(have) != set(names):
                raise InvalidInput(
                    f"recording {self.name}: step {instant.step} ran the branches "
                    f"{', '.join(have)}, others {', '.join(names)}; record one branch, or a step "
                    "window"
                )
            for branches, block, at in filed:
                piece = block.piece(at)
                if piece.shape[2:] != first.shape[2:]:
                    raise self._unequal(piece, first, branches, instant)
                if out is None:
                    shape = (count, len(names), len(instants), *first.shape[2:])
                    out = torch.empty(shape, dtype=first.dtype, device=first.device)
                for chunk, name in enumerate(branches):
                    out[:, names.index(name), number] = piece[:, chunk]
        assert out is not None
        return out

    def _unequal(
        self, piece: Tensor, first: Tensor, branches: tuple[str, ...], instant: StepInfo
    ) -> InvalidInput:
        """Why values of different sizes do not make one tensor, and what to do."""
        got = f"{_sizes(piece)} in branch {', '.join(branches)} at step {instant.step}"
        return InvalidInput(
            f"recording {self.name}: {got}, {_sizes(first)} before, so they fit no one tensor. "
            "Where the branches have prompts of different length, record one with branch=; of a "
            "language model, the prompt with steps=0 and what it generates with steps=slice(1, "
            "None)"
        )


def _copy(x: Tensor, device: Any, dtype: torch.dtype | None) -> Tensor:
    """In memory of its own, row by row."""
    form = torch.contiguous_format
    if device is None and dtype is None:
        return x.clone(memory_format=form)
    return x.to(device or x.device, dtype or x.dtype, copy=True, memory_format=form)


def _sizes(piece: Tensor) -> str:
    return "x".join(map(str, piece.shape[2:]))


def available_memory() -> int:
    """Bytes of main memory that are free now, less a fifth for everything else."""
    import os

    try:
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.8)
    except (ValueError, OSError):  # a system that does not say
        return 8 * 2**30
