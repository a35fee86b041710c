"""The intervention program: an ordered list of changes of every row, in one pass over memory.

Semantics of one instruction with strength s on a row x, restricted to its channels:

    steer            x + s v                           scale   x (1 + s (f - 1))
    clamp_component  x + s (clamp(c, lo, hi) - c) v    clamp   x + s (clamp(x, lo, hi) - x)
    project          x - s V'V x                       fill    x + s (v - x)
    renorm           x (1 + s (|x0| / |x| - 1))        patch   x + s (source[index] - x)

with c = <x, v> and x0 the row as the program found it. s = 0 leaves the row untouched bit for bit;
s = 1 gives clamp, fill and patch their target exactly, and fill and patch then do not read x. Rows
are computed in float32 (float64 for float64) and rounded once, at the end.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad

from dreamreader import _alloc
from dreamreader._register import Kernel, active, native, register
from dreamreader.errors import InvalidInput
from dreamreader.ops._intervention_gradient import backward, setup_context, twice
from dreamreader.ops._intervention_steps import apply_step
from dreamreader.ops._types import FLOATS, NEEDED
from dreamreader.ops.intervention_program import KINDS, Program, decode, live

TABLES = "str code, Tensor strength, Tensor vectors, Tensor limits, Tensor masks, Tensor[] patches"


def intervene(
    x: Float[Tensor, "rows tokens width"], program: Program
) -> Float[Tensor, "rows tokens width"]:
    """Applies a program to every row of an activation and returns a new tensor.

    Formula: see the module; x_out = step_P(... step_1(x)), each step on the selected channels only.

    Args:
        x: activation [rows, tokens, width] of any strides, float32, bfloat16, float16 or float64.
        program: built for this shape and device.

    Returns:
        A new tensor with the shape, dtype and memory order of `x`. Differentiable in `x`,
        strengths, vectors and patch sources; a strength at 0 gets the formula's derivative there.

    Raises:
        InvalidInput: `x` has another shape or device than the program, or is of another type.

    Example:
        >>> import torch
        >>> from dreamreader.ops import Instruction
        >>> double = Program([Instruction("scale", lo=2.0)], rows=1, tokens=1, width=3)
        >>> intervene(torch.tensor([[[1.0, -2.0, 0.5]]]), double)
        tensor([[[ 2., -4.,  1.]]])

    Limits: norms of float32 rows are roots of sums of squares, which overflow above 1.8e19 and
    underflow below 1e-19: `renorm` may leave a row of such a norm as it is.
    """
    if x.shape != program.shape or x.device != program.device or x.dtype not in FLOATS:
        raise _mismatch("intervene", x, program)
    if _passes_dispatcher(x, program):
        return _cpu(x, *program.tables(x.dtype))
    return _intervene(x, *program.tables(x.dtype))


def intervene_(
    x: Float[Tensor, "rows tokens width"], program: Program
) -> Float[Tensor, "rows tokens width"]:
    """Applies a program in the memory of the activation; rows of strength 0 are not visited.

    Args:
        x: activation [rows, tokens, width] without gradient, any strides that do not overlap.
        program: built for this shape and device.

    Returns:
        `x` itself, its version counter raised by one.

    Raises:
        InvalidInput: as `intervene`; or `x` requires grad, or a table of the program does while
            gradients are recorded.

    Example:
        >>> import torch
        >>> from dreamreader.ops import Instruction
        >>> x = torch.ones(1, 2, 2)
        >>> second = Instruction("fill", torch.tensor([[0.0, 1.0]]), vectors=torch.zeros(2))
        >>> intervene_(x, Program([second], rows=1, tokens=2, width=2))
        tensor([[[1., 1.],
                 [0., 0.]]])
    """
    if x.shape != program.shape or x.device != program.device or x.dtype not in FLOATS:
        raise _mismatch("intervene_", x, program)
    if x.requires_grad or (program.requires_grad and torch.is_grad_enabled()):
        who = "x" if x.requires_grad else "a table of the program"
        raise InvalidInput(
            f"intervene_: {who} requires grad and an edit in place has no gradient; use intervene"
        )
    if _is_compiling() or forward_ad._current_level >= 0:  # there the tables have to be seen
        _intervene_(x, *program.tables(x.dtype))
    else:
        _intervene_live_(x, program.number)
    return x


CHANGED, OVERFLOWED, NOT_FINITE = 1, 2, 4


def intervene_seen(
    x: Float[Tensor, "rows tokens width"],
    program: Program,
    seen: Int[Tensor, " n"],
    at: int,
    compare: bool = True,
) -> Float[Tensor, "rows tokens width"]:
    """Applies a program and tells, from the same pass over memory, what it did to the values.

    To `seen[at]` are added CHANGED where a value is another one and, in half precision, OVERFLOWED
    where the touched rows got a value that is not finite, NOT_FINITE where they had one before
    (on a GPU also where the edit has removed it).

    Args:
        x: activation [rows, tokens, width] of any strides.
        program: built for this shape and device.
        seen: int32 on the device of x; nothing waits for it.
        at: place in it.
        compare: whether CHANGED is asked for; where no kernel tells it on its way it is a pass.

    Returns:
        A new tensor, as `intervene`. Where gradients, torch.func or torch.compile follow, `seen`
        is filled by operations of torch.

    Raises:
        InvalidInput: as `intervene`.

    Example:
        >>> import torch
        >>> from dreamreader.ops import Instruction
        >>> seen = torch.zeros(1, dtype=torch.int32)
        >>> double = Program([Instruction("scale", lo=2.0)], rows=1, tokens=1, width=2)
        >>> y = intervene_seen(torch.tensor([[[3e4, 4e4]]]).half(), double, seen, 0)
        >>> int(seen) == CHANGED | OVERFLOWED
        True
    """
    if x.shape != program.shape or x.device != program.device or x.dtype not in FLOATS:
        raise _mismatch("intervene_seen", x, program)
    if _passes_dispatcher(x, program):
        out = _alloc.empty_like(x)
        _native.intervene_seen_cpu(x, out, *program.tables(x.dtype), _threads(), seen, at)
        return out
    followed = _is_grad_enabled() and (x.requires_grad or program.requires_grad)
    if followed or _is_compiling() or forward_ad._current_level >= 0 or _in_torch_func():
        y = _intervene(x, *program.tables(x.dtype))
        look(x, y, seen, at, compare)
        return y
    return _intervene_seen(x, program.number, seen, at, compare)


def intervention_of(program: Program, x: Tensor) -> Callable[..., Tensor]:
    """`intervene` with a program for values of the form of x, its tables taken apart once.

    The function takes the values, and where it shall tell what it did also `seen` and `at`, as
    `intervene_seen` without `compare`. No table of the program may require grad.
    """
    tables = program.tables(x.dtype)
    prepared: Any = None
    if _prepare and not program.patches and _passes_dispatcher(x, program):
        prepared = _prepare(x, tables[0], tables[1:5], _alloc.empty_like_of(x), _MODES)

    def general(x: Tensor, *place: Any) -> Tensor:
        if place:
            return intervene_seen(x, program, place[0], place[1], compare=False)
        return intervene(x, program)

    def run(x: Tensor, *place: Any) -> Tensor:
        if x.requires_grad or forward_ad._current_level >= 0:
            return general(x, *place)
        y = prepared(x, _threads(), *place)
        return general(x, *place) if y is None else y

    return general if prepared is None else run


def _passes_dispatcher(x: Tensor, program: Program) -> bool:
    """Whether the dispatcher, which takes longer than a small edit, would only call the kernel."""
    return (
        _direct
        and not _is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and not (_is_grad_enabled() and (x.requires_grad or program.requires_grad))
        and forward_ad._current_level < 0
        and not _in_torch_func()
        and not x.is_neg()
        and not _len_dispatch_stack()
        and not _len_function_stack()
        and _tracing_state() is None
    )


@torch.no_grad()
def look(x: Tensor, y: Tensor, seen: Tensor, at: int, compare: bool = True) -> None:
    """Adds to `seen[at]` what `intervene_seen` would of a change of x to y, without waiting.

    Args:
        compare: whether to ask for CHANGED too.
    """
    half = y.dtype in (torch.bfloat16, torch.float16)
    if not y.numel() or not (half or compare):
        return
    found: Any = 0
    if compare:  # in main memory `equal` makes no tensor of answers
        found = CHANGED * (not torch.equal(x, y) if y.is_cpu else torch.ne(x, y).any())
    if half:
        bad = _not_finite(y)
        if not y.is_cpu or bool(bad):
            found = found + bad * (OVERFLOWED + NOT_FINITE * _not_finite(x))
    seen[at].bitwise_or_(torch.as_tensor(found, dtype=torch.int32, device=seen.device))


def _not_finite(x: Tensor) -> Tensor:
    """Whether any value is NaN or infinite; both come through the least and the greatest value."""
    low, high = torch.aminmax(x)
    return ~(low.isfinite() & high.isfinite())


def intervene_reference(
    x: Tensor,
    code: str,
    strength: Tensor,
    vectors: Tensor,
    limits: Tensor,
    masks: Tensor,
    patches: Sequence[Tensor],
) -> Tensor:
    """The definition of `intervene` in plain torch, over packed tables, on any device.

    Args:
        x: [B, T, D].
        code: packed steps, see `program.Step`.
        strength: [P, B, T], float64 for float64 x and float32 otherwise.
        vectors: [V, D], limits: [L, 2, B], masks: bool [M, D].
        patches: source [S, D] and index [B, T] of each patch in turn.

    Returns:
        [B, T, D] like x.
    """
    entry = x.to(strength.dtype)  # [B, T, D]
    y = entry
    for number, step in enumerate(decode(code)):
        s = strength[number].unsqueeze(-1)  # [B, T, 1]
        change = apply_step(step, y, entry, s, vectors, limits, masks, patches)
        y = y.clone()
        y[..., step.begin : step.end] = change
    touched = (strength != 0).any(0).unsqueeze(-1)  # [B, T, 1]
    out = _alloc.empty_like(x)
    out.copy_(torch.where(touched, y.to(x.dtype), x))
    return out


def _reference_(x: Tensor, *tables) -> None:
    x.copy_(intervene_reference(x, *tables))


def _cpu(x: Tensor, code: str, strength, vectors, limits, masks, patches) -> Tensor:
    out = _alloc.empty_like(x)
    _native.intervene_cpu(x, out, code, strength, vectors, limits, masks, patches, _threads())
    return out


def _cpu_(x: Tensor, code: str, strength, vectors, limits, masks, patches) -> None:
    if patches:
        patches = _apart(x, patches)
    _native.intervene_cpu(x, x, code, strength, vectors, limits, masks, patches, _threads())
    _increment_version(x)


def _cuda(x: Tensor, code: str, strength, vectors, limits, masks, patches) -> Tensor:
    out = _alloc.empty_like(x)
    _native.intervene_cuda(x, out, code, strength, vectors, limits, masks, patches)
    return out


def _cuda_(x: Tensor, code: str, strength, vectors, limits, masks, patches) -> None:
    if patches:
        patches = _apart(x, patches)
    _native.intervene_cuda(x, x, code, strength, vectors, limits, masks, patches)
    _increment_version(x)


def _reference_live_(x: Tensor, number: int) -> None:
    _reference_(x, *live(number).tables(x.dtype))


def _cpu_live_(x: Tensor, number: int) -> None:
    code, strength, vectors, limits, masks, patches = live(number).tables(x.dtype)
    _cpu_(x, code, strength, vectors, limits, masks, patches)


def _cuda_live_(x: Tensor, number: int) -> None:
    _cuda_(x, *live(number).tables(x.dtype))


def _triton_live_(x: Tensor, number: int) -> None:
    _triton_(x, *live(number).tables(x.dtype))


def _reference_seen(x: Tensor, number: int, seen: Tensor, at: int, compare: bool = True) -> Tensor:
    y = intervene_reference(x, *live(number).tables(x.dtype))
    look(x, y, seen, at, compare)
    return y


def _cpu_seen(x: Tensor, number: int, seen: Tensor, at: int, compare: bool = True) -> Tensor:
    out = _alloc.empty_like(x)
    tables = live(number).tables(x.dtype)
    _native.intervene_seen_cpu(x, out, *tables, _threads(), seen, at)
    return out


def _cuda_seen(x: Tensor, number: int, seen: Tensor, at: int, compare: bool = True) -> Tensor:
    out = _alloc.empty_like(x)
    _native.intervene_seen_cuda(x, out, *live(number).tables(x.dtype), seen, at)
    return out


def _triton_seen(x: Tensor, number: int, seen: Tensor, at: int, compare: bool = True) -> Tensor:
    out = _alloc.empty_like(x)
    tables = live(number).tables(x.dtype)
    import_module(_TRITON).intervention(x, out, *tables, seen=seen, at=at)
    return out


def _triton(x: Tensor, *tables) -> Tensor:
    out = _alloc.empty_like(x)
    import_module(_TRITON).intervention(x, out, *tables)
    return out


def _triton_(x: Tensor, code: str, strength, vectors, limits, masks, patches) -> None:
    kernel = import_module(_TRITON).intervention
    kernel(x, x, code, strength, vectors, limits, masks, _apart(x, patches))
    _increment_version(x)


def _apart(x: Tensor, patches: Sequence[Tensor]) -> list[Tensor]:
    """`patches` with copies of those that share memory with x, which is about to change."""
    memory = x.untyped_storage().data_ptr()
    return [
        each.clone() if each.untyped_storage().data_ptr() == memory else each for each in patches
    ]


def _fake(x: Tensor, *tables) -> Tensor:
    return torch.empty_like(x)


def _fake_seen(x: Tensor, number: int, seen: Tensor, at: int, compare: bool = True) -> Tensor:
    return torch.empty_like(x)


def _fake_(x: Tensor, *tables) -> None:
    return None


def _mismatch(name: str, x: Tensor, program: Program) -> InvalidInput:
    if x.dtype not in FLOATS:
        return InvalidInput(f"{name}: x is {x.dtype}, floating point is needed: {NEEDED}")
    if x.device != program.device:
        return InvalidInput(f"{name}: x is on {x.device}, the program on {program.device}")
    if x.dim() == 3 and x.shape[2] != program.width:
        return InvalidInput(f"{name}: x has {x.shape[2]} features, the program {program.width}")
    return InvalidInput(f"{name}: x is {list(x.shape)}, the program is for {list(program.shape)}")


_native: Any = native()[0]
_prepare: Any = getattr(_native, "prepare_intervention", None)
_is_compiling = torch.compiler.is_compiling
_threads = torch.get_num_threads
_is_grad_enabled = torch.is_grad_enabled
_len_dispatch_stack = torch._C._len_torch_dispatch_stack
_len_function_stack = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_in_torch_func: Any = vars(torch._C)["_functorch"].peek_interpreter_stack
_MODES = (_len_dispatch_stack, _len_function_stack, _tracing_state, _in_torch_func)
_increment_version = torch.autograd.graph.increment_version
_TRITON = "dreamreader.triton_kernels.intervention"

_intervene = register(
    "intervene",
    f"(Tensor x, {TABLES}) -> Tensor",
    reference=intervene_reference,
    fake=_fake,
    cpu=Kernel("intervene_cpu", _cpu),
    cuda=Kernel("intervene_cuda", _cuda),
    triton=Kernel(_TRITON, _triton),
    setup_context=setup_context,
    backward=backward,
    twice=twice,
)
_intervene_ = register(
    "intervene_",
    f"(Tensor(a!) x, {TABLES}) -> ()",
    reference=_reference_,
    fake=_fake_,
    cpu=Kernel("intervene_cpu", _cpu_),
    cuda=Kernel("intervene_cuda", _cuda_),
    triton=Kernel(_TRITON, _triton_),
)

# The same by the number of a live program: the dispatcher's time goes with the number of arguments
# (about 1.5 us for these two, 2.3 for those of intervene_).
_intervene_live_ = register(
    "intervene_live_",
    "(Tensor(a!) x, int number) -> ()",
    reference=_reference_live_,
    fake=_fake_,
    cpu=Kernel("intervene_cpu", _cpu_live_),
    cuda=Kernel("intervene_cuda", _cuda_live_),
    triton=Kernel(_TRITON, _triton_live_),
)

_intervene_seen = register(
    "intervene_seen",
    "(Tensor x, int number, Tensor(a!) seen, int at, bool compare=True) -> Tensor",
    reference=_reference_seen,
    fake=_fake_seen,
    cpu=Kernel("intervene_seen_cpu", _cpu_seen),
    cuda=Kernel("intervene_seen_cuda", _cuda_seen),
    triton=Kernel(_TRITON, _triton_seen),
)
_direct = all(active[each]["CPU"].backend == "native" for each in ("intervene", "intervene_seen"))

__all__ = [
    "CHANGED",
    "KINDS",
    "NOT_FINITE",
    "OVERFLOWED",
    "intervene",
    "intervene_",
    "intervene_reference",
    "intervene_seen",
    "look",
]
