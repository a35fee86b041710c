"""The affine low-rank edit that LoReFT and its variants fold into, with its gradient.

    y = x + s U'(A x + b)

LoReFT is U = R, A = W - R with orthonormal rows of R; DiReFT leaves the difference out, A = W.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader import _alloc
from dreamreader._register import Kernel, native, register
from dreamreader.errors import InvalidInput
from dreamreader.ops import _low_rank_gpu as gpu
from dreamreader.ops._types import FLOATS, NEEDED

MAX_RANK = 256

TABLES = "Tensor down, Tensor bias, Tensor up, Tensor strength, Tensor index"
NEEDS = (True, True, True, True)  # gradients of x, of down and bias, of up, of strength


def low_rank(
    x: Float[Tensor, "batch tokens width"],
    down: Float[Tensor, "*adapters rank width"],
    bias: Float[Tensor, "*adapters rank"],
    up: Float[Tensor, "*adapters rank width"],
    strength: float | Float[Tensor, "..."] = 1.0,
    index: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch tokens width"]:
    """Adds a low-rank affine function of every row to it and returns a new tensor.

    Formula: y = x + s U'(A x + b), computed in float32 (float64 for float64), rounded once.

    Args:
        x: activation [batch, tokens, width] of any strides, float32, bfloat16, float16
            or float64.
        down: A, [adapters, rank, width] or [rank, width], float32 (float64 for float64 x).
        bias: b, [adapters, rank] or [rank].
        up: U, shaped as `down`.
        strength: s, a number or a tensor that broadcasts to [batch, tokens]. 0 leaves a row
            untouched bit for bit, and so does A x + b = 0.
        index: int64 [batch], the adapter of each batch entry; the first for all by default.

    Returns:
        A new tensor with the shape, dtype and memory order of `x`. Differentiable in `x`, `down`,
        `bias`, `up` and `strength`; a strength at 0 gets the formula's derivative there.

    Raises:
        InvalidInput: shapes, dtypes or devices that do not fit, or a rank above 256.

    Example:
        >>> import torch
        >>> first = torch.tensor([[1.0, 0.0]])
        >>> low_rank(torch.tensor([[[3.0, 4.0]]]), -first, torch.tensor([2.0]), first)
        tensor([[[2., 4.]]])

    Reference:
        Wu et al., ReFT: Representation Finetuning for Language Models (2404.03592), equation 2.
    """
    return _low_rank(x, *_tables("low_rank", x, down, bias, up, strength, index))


def low_rank_(
    x: Float[Tensor, "batch tokens width"],
    down: Float[Tensor, "*adapters rank width"],
    bias: Float[Tensor, "*adapters rank"],
    up: Float[Tensor, "*adapters rank width"],
    strength: float | Float[Tensor, "..."] = 1.0,
    index: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch tokens width"]:
    """`low_rank` in the memory of the activation; rows of strength 0 are not visited.

    Args:
        x: activation without gradient, any strides that do not overlap; the others as in
            `low_rank`.

    Returns:
        `x` itself, its version counter raised by one.

    Raises:
        InvalidInput: as `low_rank`; or `x` requires grad.
    """
    if x.requires_grad:
        raise InvalidInput(
            "low_rank_: x requires grad and an edit in place has no gradient; use low_rank"
        )
    _low_rank_(x, *_tables("low_rank_", x, down, bias, up, strength, index))
    return x


def low_rank_reference(
    x: Tensor, down: Tensor, bias: Tensor, up: Tensor, strength: Tensor, index: Tensor
) -> Tensor:
    """The definition of `low_rank` in plain torch, on any device.

    Args:
        x: [B, T, D]. down, up: [n, r, D]. bias: [n, r]. strength: [B, T]. index: int64 [B].

    Returns:
        [B, T, D] like x.
    """
    z, s = _project_down(x, down, bias, strength, index)  # [B, T, r], [B, T, 1]
    y = x.to(s.dtype) + s * (z @ up[index])
    touched = (s != 0) & (z != 0).any(-1, keepdim=True)
    out = _alloc.empty_like(x)
    out.copy_(torch.where(touched, y.to(x.dtype), x))
    return out


def low_rank_backward_reference(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    bias: Tensor,
    up: Tensor,
    strength: Tensor,
    index: Tensor,
    needs: Sequence[bool] = NEEDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, down, bias, up and strength, in plain torch on any device.

    With z = A x + b and d = s U g: dx = g + A'd, dA = sum d x', db = sum d, dU = sum s z g',
    ds = <U g, z>. Rows of strength 0 pass g on bit for bit and add nothing to the tables.

    Args:
        grad: [B, T, D], gradient of the result; the others as in `low_rank_reference`.
        needs: which of x, (down, bias), up and strength need theirs.

    Returns:
        [B, T, D] like grad, [n, r, D], [n, r], [n, r, D], [B, T], the last four like the tables;
        [0] in place of what is not needed.
    """
    z, s = _project_down(x, down, bias, strength, index)
    on = s != 0
    g = grad.to(s.dtype)  # [B, T, D]
    along = g @ up[index].mT  # [B, T, r]: U g
    d = torch.where(on, s * along, 0)
    dx, d_down, d_bias, d_up, d_strength = _empty_gradients(grad, down, bias, up, strength, needs)
    if needs[0]:
        dx.copy_(torch.where(on, (g + d @ down[index]).to(grad.dtype), grad))
    if needs[1]:
        rows = torch.where(on, x.to(s.dtype), 0)
        d_down.zero_().index_add_(0, index, d.mT @ rows)  # [B, r, D]
        d_bias.zero_().index_add_(0, index, d.sum(1))
    if needs[2]:
        heard = torch.where(on, s * z, 0)
        d_up.zero_().index_add_(0, index, heard.mT @ torch.where(on, g, 0))
    if needs[3]:
        d_strength.copy_((along * z).sum(-1))
    return dx, d_down, d_bias, d_up, d_strength


def _empty_gradients(
    grad: Tensor, down: Tensor, bias: Tensor, up: Tensor, strength: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def room(like: Tensor, needed: bool) -> Tensor:
        shape = like.shape if needed else (0,)
        return _alloc.empty(shape, dtype=like.dtype, device=like.device)

    x, tables, said, scaled = needs
    dx = _alloc.empty_like(grad) if x else room(grad, False)
    return dx, room(down, tables), room(bias, tables), room(up, said), room(strength, scaled)


def _project_down(
    x: Tensor, down: Tensor, bias: Tensor, strength: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """A x + b, [B, T, r], and the strength as [B, T, 1]."""
    z = x.to(strength.dtype) @ down[index].mT + bias[index].unsqueeze(1)
    return z, strength.unsqueeze(-1)


def _tables(
    name: str,
    x: Tensor,
    down: Tensor,
    bias: Tensor,
    up: Tensor,
    strength: float | Tensor,
    index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The checked arguments, with all their dimensions."""
    if x.dim() != 3 or x.dtype not in FLOATS:
        wanted = f"floating point [batch, tokens, width] of {NEEDED}"
        raise InvalidInput(f"{name}: x must be {wanted}, got {_s(x)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if down.dim() == 2:
        down, bias, up = down.unsqueeze(0), bias.unsqueeze(0), up.unsqueeze(0)
    if down.dim() != 3 or down.shape[2] != x.shape[2]:
        got = f"down is {list(down.shape)}"
        raise InvalidInput(f"{name}: x has {x.shape[2]} features, {got}")
    if up.shape != down.shape or bias.shape != down.shape[:2]:
        raise InvalidInput(
            f"{name}: down is {list(down.shape)}, so up must be the same and bias "
            f"{list(down.shape[:2])}; got {list(up.shape)} and {list(bias.shape)}"
        )
    if not len(down):
        raise InvalidInput(f"{name}: down holds no adapter, at least one is needed")
    if not 1 <= down.shape[1] <= MAX_RANK:
        raise InvalidInput(f"{name}: rank {down.shape[1]}, from 1 to {MAX_RANK} is possible")
    for label, table in (("down", down), ("bias", bias), ("up", up)):
        if table.dtype != wide or table.device != x.device:
            raise InvalidInput(
                f"{name}: x is {x.dtype} on {x.device}, so {label} must be {wide} there, got "
                f"{table.dtype} on {table.device}"
            )
    if not isinstance(strength, Tensor):
        strength = torch.full((), strength, dtype=wide)
    strength = strength.to(x.device, wide)
    try:
        strength = strength.expand(x.shape[:2])
    except RuntimeError:
        raise InvalidInput(
            f"{name}: strength {list(strength.shape)} does not broadcast to {list(x.shape[:2])}"
        ) from None
    if index is None:
        index = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    elif index.dtype != torch.int64 or index.shape != x.shape[:1] or index.device != x.device:
        wanted = f"int64 [{x.shape[0]}] on {x.device}"
        raise InvalidInput(f"{name}: index must be {wanted}, got {_s(index)} on {index.device}")
    return down.contiguous(), bias.contiguous(), up.contiguous(), strength, index


def _cpu(x: Tensor, *tables) -> Tensor:
    out = _alloc.empty_like(x)
    _native.low_rank_cpu(x, out, *tables, _threads())
    return out


def _cpu_(x: Tensor, *tables) -> None:
    _native.low_rank_cpu(x, x, *tables, _threads())
    _increment_version(x)


def _cpu_backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    bias: Tensor,
    up: Tensor,
    strength: Tensor,
    index: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = _empty_gradients(grad, down, bias, up, strength, needs)
    _native.low_rank_backward_cpu(grad, x, down, bias, up, strength, index, *out, _threads())
    return out


def _on_gpu(launch: Callable[..., None]) -> Callable:
    return gpu.gradient(launch, low_rank_backward_reference, _empty_gradients)


def _reference_(x: Tensor, *tables) -> None:
    x.copy_(low_rank_reference(x, *tables))


def _fake(x: Tensor, *tables) -> Tensor:
    return torch.empty_like(x)


def _fake_(x: Tensor, *tables) -> None:
    return None


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    bias: Tensor,
    up: Tensor,
    strength: Tensor,
    index: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(grad, down, bias, up, strength, needs)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple:
    return _gradients(ctx, grad, _low_rank_backward)


def _twice(ctx, grad: Tensor):
    """`_backward` where it is differentiated again.

    Not with a strength: its 0 is taken exactly, and so has no derivative there.
    """
    strength = ctx.needs_input_grad[4]
    return NotImplemented if strength else _gradients(ctx, grad, low_rank_backward_reference)


def _gradients(ctx, grad: Tensor, compute: Callable) -> tuple:
    x, down, bias, up, strength, _ = ctx.needs_input_grad
    needs = (x, down or bias, up, strength)
    dx, d_down, d_bias, d_up, d_strength = compute(grad, *ctx.saved_tensors, needs)
    return (
        dx if x else None,
        d_down if down else None,
        d_bias if bias else None,
        d_up if up else None,
        d_strength if strength else None,
        None,
    )


def _s(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


_native: Any = native()[0]
_threads = torch.get_num_threads
_increment_version = torch.autograd.graph.increment_version

_low_rank = register(
    "low_rank",
    f"(Tensor x, {TABLES}) -> Tensor",
    reference=low_rank_reference,
    fake=_fake,
    cpu=Kernel("low_rank_cpu", _cpu),
    cuda=Kernel("low_rank_cuda", gpu.edit(gpu.cuda, low_rank_reference)),
    triton=Kernel(gpu.TRITON, gpu.edit(gpu.triton, low_rank_reference)),
    setup_context=_setup_context,
    backward=_backward,
    twice=_twice,
)
_low_rank_ = register(
    "low_rank_",
    f"(Tensor(a!) x, {TABLES}) -> ()",
    reference=_reference_,
    fake=_fake_,
    cpu=Kernel("low_rank_cpu", _cpu_),
    cuda=Kernel("low_rank_cuda", gpu.edit_(gpu.cuda, _reference_)),
    triton=Kernel(gpu.TRITON, gpu.edit_(gpu.triton, _reference_)),
)
_low_rank_backward = register(
    "low_rank_backward",
    f"(Tensor grad, Tensor x, {TABLES}, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=low_rank_backward_reference,
    fake=_fake_backward,
    cpu=Kernel("low_rank_backward_cpu", _cpu_backward),
    cuda=Kernel("low_rank_backward_cuda", _on_gpu(gpu.cuda_backward)),
    triton=Kernel(gpu.TRITON, _on_gpu(gpu.triton_backward)),
)
