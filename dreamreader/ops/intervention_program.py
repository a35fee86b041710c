"""Intervention programs: what to do to the rows of an activation, checked and packed once.

The packed form is what kernels read. `code` is text, so that it is a constant of a compiled graph:
one group of comma-separated integers per instruction, groups joined by `;`, in the order of the
fields of `Step`.
"""

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName

KINDS = ("steer", "scale", "clamp", "clamp_component", "project", "fill", "patch", "renorm")
MAX_INSTRUCTIONS = 32
MAX_SOURCES = 8
MAX_SUBSPACE = 64
# Directions normalised in bfloat16 miss unit length by up to 4e-3; more is a mistake.
ORTHONORMAL_TOLERANCE = 5e-3

# Programs that are in use, by number: an op can name one without taking its tables apart.
_live: dict[int, weakref.ref] = {}
_numbers = itertools.count()

Tables = tuple[str, Tensor, Tensor, Tensor, Tensor, list[Tensor]]


class Step(NamedTuple):
    """One packed instruction; -1 where a table is not used."""

    kind: int  # index into KINDS
    one_sided: int  # project: 1 removes only positive components
    vector: int  # first row in the vector table
    size: int  # rows in the vector table
    begin: int  # channels begin .. end - 1 are read and written,
    end: int
    mask: int  # and among them only those of this row of the mask table
    limit: int  # row of the limit table
    source: int  # number of the patch source


@dataclass(frozen=True, eq=False)
class Instruction:
    """One change of every row of an activation.

    Args:
        kind: one of `KINDS`.
        strength: number or tensor that broadcasts to [rows, tokens]. 0 leaves a row untouched bit
            for bit, so the selection of rows, tokens, steps and branches is part of the strength.
        vectors: [m, width] or [width]: the direction of `steer`, the unit direction of
            `clamp_component`, the orthonormal rows of `project` (m <= 64), the values of `fill`.
        lo: lower bound of `clamp` and `clamp_component` (none: unbounded), the factor of `scale`;
            number or [rows].
        hi: upper bound; number or [rows].
        source: [entries, width], what `patch` reads.
        index: int64, broadcasts to [rows, tokens]: the entry of `source` for each row.
        channels: bool [width], the channels that are read and written; all by default.
        one_sided: `project` removes only a positive component (one vector).
    """

    kind: str
    strength: float | Float[Tensor, "..."] = 1.0
    vectors: Float[Tensor, "..."] | None = None
    lo: float | Float[Tensor, "..."] | None = None
    hi: float | Float[Tensor, "..."] | None = None
    source: Float[Tensor, "entries width"] | None = None
    index: Int[Tensor, "..."] | None = None
    channels: Bool[Tensor, " width"] | None = None
    one_sided: bool = False


@lru_cache(maxsize=1024)
def decode(code: str) -> tuple[Step, ...]:
    """The steps that a packed `code` stands for."""
    groups = (group.split(",") for group in code.split(";")) if code else ()
    return tuple(Step(*map(int, group)) for group in groups)


def live(number: int) -> "Program":
    """The program with this number.

    Raises:
        InvalidInput: it is gone; a graph that was traced with it outlived it.
    """
    program = _live.get(number, _find_nothing)()
    if program is None:
        raise InvalidInput(
            f"intervention program {number} no longer exists; keep a reference to it"
        )
    return program


def _find_nothing() -> None:
    return None


class Program:
    """An ordered list of instructions for activations of one shape, checked once and immutable.

    Args:
        instructions: applied in order, each to the result of the one before.
        rows, tokens, width: the shape [rows, tokens, width] that the program applies to.
        device: where the activation lives; tables are moved there.

    Raises:
        InvalidInput: an instruction lacks what its kind needs, or has a table of a wrong shape or
            with values that are not finite.

    Example:
        >>> import torch
        >>> steer = Instruction("steer", 2.0, vectors=torch.ones(4))
        >>> Program([steer], rows=1, tokens=3, width=4).code
        '0,0,0,1,0,4,-1,-1,-1'
    """

    def __init__(
        self,
        instructions: Sequence[Instruction],
        *,
        rows: int,
        tokens: int,
        width: int,
        device: torch.device | str = "cpu",
    ):
        if len(instructions) > MAX_INSTRUCTIONS:
            raise InvalidInput(
                f"a program holds up to {MAX_INSTRUCTIONS} instructions, got {len(instructions)}"
            )
        self.shape = (rows, tokens, width)
        self.rows, self.tokens, self.width = self.shape
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self._dtype = _widest(instructions)
        self._vectors: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._limits: list[Tensor] = []
        self.patches: list[Tensor] = []
        steps = [self._pack(number, each) for number, each in enumerate(instructions)]
        self.code = ";".join(",".join(map(str, step)) for step in steps)
        self.strength = self._strengths([each.strength for each in instructions])
        self.vectors = torch.cat(self._vectors) if self._vectors else self._zeros(0, width)
        self.limits = torch.stack(self._limits) if self._limits else self._zeros(0, 2, rows)
        self.masks = torch.stack(self._masks) if self._masks else self._zeros(0, width).bool()
        self._tables: dict[torch.dtype, Tables] = {}
        self._enter()

    def __len__(self) -> int:
        return len(decode(self.code))

    def __repr__(self) -> str:
        kinds = ", ".join(KINDS[step.kind] for step in decode(self.code))
        shape = f"rows={self.rows}, tokens={self.tokens}, width={self.width}"
        return f"Program([{kinds}], {shape}, device={self.device})"

    def with_strengths(self, strengths: Sequence[float | Tensor]) -> "Program":
        """The same program with other strengths, one per instruction; shares every other table."""
        if len(strengths) != len(self):
            raise InvalidInput(
                f"the program has {len(self)} instructions, got {len(strengths)} strengths"
            )
        other = object.__new__(Program)
        other.__dict__.update(self.__dict__)
        other.strength = other._strengths(strengths)
        other._tables = {}
        other._enter()
        return other

    def _enter(self) -> None:
        tables = (self.strength, self.vectors, *self.patches)
        self.requires_grad = any(each.requires_grad for each in tables)
        number = self.number = next(_numbers)
        _live[number] = weakref.ref(self, lambda _: _live.pop(number, None))

    def tables(self, dtype: torch.dtype) -> Tables:
        """The packed tables for activations of `dtype`: the arguments of the op after x."""
        try:
            return self._tables[dtype]
        except KeyError:
            work = torch.float64 if dtype == torch.float64 else torch.float32
            floats = (self.strength.to(work), self.vectors.to(work), self.limits.to(work))
            return self._tables.setdefault(dtype, (self.code, *floats, self.masks, self.patches))

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self.device)

    def _pack(self, number: int, each: Instruction) -> Step:
        if each.kind not in KINDS:
            raise UnknownName("instruction", each.kind, KINDS)
        name = f"instruction {number} ({each.kind})"
        begin, end, mask = self._channels(name, each.channels)
        vector, count = self._vector(name, each)
        return Step(
            KINDS.index(each.kind),
            int(each.one_sided),
            vector,
            count,
            begin,
            end,
            mask,
            self._limit(name, each),
            self._source(name, each),
        )

    def _channels(self, name: str, channels: Tensor | None) -> tuple[int, int, int]:
        if channels is None:
            return 0, self.width, -1
        if channels.dtype != torch.bool or channels.shape != (self.width,):
            raise InvalidInput(
                f"{name}: channels must be bool [{self.width}], got {_describe(channels)}"
            )
        chosen = channels.nonzero().flatten().tolist()
        if not chosen:
            raise InvalidInput(f"{name}: channels selects none of the {self.width} channels")
        begin, end = chosen[0], chosen[-1] + 1
        if len(chosen) == end - begin:
            return begin, end, -1
        self._masks.append(channels.to(self.device))
        return begin, end, len(self._masks) - 1

    def _vector(self, name: str, each: Instruction) -> tuple[int, int]:
        needed = each.kind in ("steer", "clamp_component", "project", "fill")
        if needed != (each.vectors is not None):
            raise InvalidInput(f"{name}: {'needs' if needed else 'takes no'} vectors")
        if each.one_sided and each.kind != "project":
            raise InvalidInput(f"{name}: one_sided belongs to project")
        if each.vectors is None:
            return -1, 0
        vectors = each.vectors.reshape(1, -1) if each.vectors.dim() == 1 else each.vectors
        if vectors.dim() != 2 or vectors.shape[1] != self.width or not vectors.is_floating_point():
            raise InvalidInput(
                f"{name}: x has {self.width} features, vectors is {_describe(each.vectors)}"
            )
        most = MAX_SUBSPACE if each.kind == "project" and not each.one_sided else 1
        if not 1 <= len(vectors) <= most:
            raise InvalidInput(f"{name}: takes 1 to {most} vectors, got {len(vectors)}")
        _finite(name, "vectors", vectors)
        vectors = vectors.to(self.device, self._dtype)
        if each.channels is not None:
            vectors = torch.where(each.channels.to(self.device), vectors, 0)
        if each.kind in ("clamp_component", "project"):
            _orthonormal(name, vectors)
        first = sum(map(len, self._vectors))
        self._vectors.append(vectors)
        return first, len(vectors)

    def _limit(self, name: str, each: Instruction) -> int:
        if each.kind == "scale" and (each.lo is None or each.hi is not None):
            raise InvalidInput(f"{name}: needs its factor as lo, and no hi")
        if each.kind in ("clamp", "clamp_component") and each.lo is None and each.hi is None:
            raise InvalidInput(f"{name}: needs lo, hi or both")
        if each.kind not in ("scale", "clamp", "clamp_component"):
            if each.lo is not None or each.hi is not None:
                raise InvalidInput(f"{name}: takes no lo or hi")
            return -1
        label = "factor (lo)" if each.kind == "scale" else "lo"
        lo = self._per_row(name, label, -torch.inf if each.lo is None else each.lo)
        hi = self._per_row(name, "hi", torch.inf if each.hi is None else each.hi)
        if each.kind == "scale":
            _finite(name, label, lo)
        elif bool((lo > hi).any()):
            raise InvalidInput(f"{name}: lo is above hi")
        self._limits.append(torch.stack([lo, hi]).to(self.device))
        return len(self._limits) - 1

    def _per_row(self, name: str, label: str, value: float | Tensor) -> Tensor:
        bound = torch.as_tensor(value, dtype=self._dtype)
        if bound.requires_grad:
            raise InvalidInput(
                f"{name}: {label} gets no gradient; detach it, or express it as a strength"
            )
        if bound.dim() > 1 or (bound.dim() == 1 and len(bound) not in (1, self.rows)):
            raise InvalidInput(
                f"{name}: {label} must be a number or [{self.rows}], got {list(bound.shape)}"
            )
        if bool(bound.isnan().any()):
            raise InvalidInput(f"{name}: {label} is NaN")
        return bound.expand(self.rows)

    def _source(self, name: str, each: Instruction) -> int:
        if each.kind != "patch":
            if each.source is not None or each.index is not None:
                raise InvalidInput(f"{name}: takes no source or index")
            return -1
        source, index = each.source, each.index
        if source is None or index is None:
            raise InvalidInput(f"{name}: needs source and index")
        if source.dim() != 2 or source.shape[1] != self.width or not source.is_floating_point():
            raise InvalidInput(
                f"{name}: source must be [entries, {self.width}], got {_describe(source)}"
            )
        if index.dtype != torch.int64 or not _broadcasts(index, self.shape[:2]):
            wanted = f"int64 [{self.rows}, {self.tokens}]"
            raise InvalidInput(f"{name}: index must be {wanted}, got {_describe(index)}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(source):
            got = f"{int(index.min())} .. {int(index.max())}"
            raise InvalidInput(f"{name}: index runs over {got}, source has {len(source)} entries")
        if len(self.patches) == 2 * MAX_SOURCES:
            raise InvalidInput(f"a program holds up to {MAX_SOURCES} patches")
        self.patches += [source.to(self.device), index.to(self.device).expand(self.shape[:2])]
        return len(self.patches) // 2 - 1

    def _strengths(self, strengths: Sequence[float | Tensor]) -> Tensor:
        """[instructions, rows, tokens] with stride 0 wherever no strength varies."""
        if not strengths:
            return self._zeros(0, self.rows, self.tokens)
        tensors = [
            torch.as_tensor(each, dtype=self._dtype, device=self.device) for each in strengths
        ]
        for number, each in enumerate(tensors):
            if not _broadcasts(each, self.shape[:2]):
                wanted = f"[{self.rows}, {self.tokens}]"
                got = list(each.shape)
                raise InvalidInput(
                    f"instruction {number}: strength must broadcast to {wanted}, got {got}"
                )
            _finite(f"instruction {number}", "strength", each)
        common = _common([each.shape for each in tensors])
        return torch.stack([each.expand(common) for each in tensors]).expand(-1, *self.shape[:2])


def _widest(instructions: Sequence[Instruction]) -> torch.dtype:
    given = [
        value for each in instructions for value in (each.strength, each.vectors, each.lo, each.hi)
    ]
    double = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in given)
    return torch.float64 if double else torch.float32


def _common(shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The sizes [rows, tokens] that all of these broadcast to; torch's own takes 50 us."""
    rows = next((each[0] for each in shapes if len(each) == 2 and each[0] != 1), 1)
    return rows, next((each[-1] for each in shapes if len(each) and each[-1] != 1), 1)


def _broadcasts(value: Tensor, shape: tuple[int, int]) -> bool:
    ends = zip(reversed(value.shape), reversed(shape), strict=False)
    return value.dim() <= 2 and all(size in (1, whole) for size, whole in ends)


def _finite(name: str, label: str, value: Tensor) -> None:
    if not bool(value.detach().isfinite().all()):
        raise InvalidInput(f"{name}: {label} has values that are not finite")


def _orthonormal(name: str, vectors: Tensor) -> None:
    wide = vectors.detach().double()  # which autocast leaves alone
    gram = wide @ wide.T
    worst = (
        (gram - torch.eye(len(vectors), dtype=gram.dtype, device=gram.device)).abs().max().item()
    )
    if worst > ORTHONORMAL_TOLERANCE:
        raise InvalidInput(
            f"{name}: vectors must be orthonormal within the selected channels, "
            f"they miss it by {worst:.2g}; use v / v.norm() or torch.linalg.qr"
        )


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
