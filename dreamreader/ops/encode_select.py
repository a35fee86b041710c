"""The encoder of a sparse autoencoder and its selection at once, without the dense activations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader import _alloc
from dreamreader._register import Kernel, native, register
from dreamreader.errors import InvalidInput
from dreamreader.ops._arguments import check_choice, check_count, check_tensor
from dreamreader.ops._selection import check_matrix, dense_rows, empty_rows, no_entries
from dreamreader.ops.batch_topk import Found, batch_topk_reference, check_pool
from dreamreader.ops.sparse_rows import SparseRows
from dreamreader.ops.threshold_select import check_threshold, threshold_select_reference
from dreamreader.ops.topk import topk_reference

TRITON = "dreamreader.triton_kernels.encode_select"
RULES = ("topk", "batch_topk", "threshold")
_BLOCK = 4 << 20  # bytes of the activations that exist at once
_FIRST = 256  # entries of a row for which `threshold` has room at first


def encode_select(
    x: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"] | None = None,
    *,
    rule: str = "batch_topk",
    count: int = 0,
    pool: Int[Tensor, " columns"] | None = None,
    threshold: Float[Tensor, "*d_sae"] | None = None,
    slots: int | None = None,
) -> SparseRows:
    """Encodes rows and keeps few of their activations, of which never more than a block exists.

    Formula: a = x weight' + bias, rounded to the dtype of x; then topk(a, count) of each row,
        batch_topk(a, count) of all rows, or threshold_select(a, threshold); inside of the pool.

    Args:
        x: rows, with the decoder's bias subtracted where the autoencoder does so; float32,
            bfloat16, float16 or float64.
        weight: a row for each latent, in the dtype of x.
        bias: of the latents, in the dtype of x.
        rule: topk, batch_topk or threshold.
        count: of topk: entries of each row; of batch_topk: entries in all.
        pool: int32, ascending: the latents that take part. All by default.
        threshold: of threshold: float32, [] or [d_sae].
        slots: of threshold: how many entries there is room for. By default there is room for all of
            them, which encodes twice where they are many, and waits for a GPU.

    Returns:
        [rows, d_sae], with the smallest value as threshold for batch_topk. Values have gradients
        for x, weight and bias, of the entries that were kept.

    Raises:
        InvalidInput: a tensor has another shape, dtype or device than the above, there is no such
            rule, or a rule lacks its count or threshold.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> codes = encode_select(torch.tensor([[1.0, 2.0]]), weight, rule="topk", count=2)
        >>> codes.columns.tolist(), codes.values.tolist()
        ([1, 2], [2.0, 3.0])
    """
    given = (x, weight, bias, rule, count, pool, threshold)
    _check(*given, slots)
    width = len(weight)
    room = len(x) * min(_FIRST, width) if slots is None else slots
    found = _encode_select(*given, room)
    if rule == "threshold" and slots is None and (needed := int(found[2][-1])) > room:
        found = _encode_select(*given, needed)
    values, smallest, row_ptr, columns = found
    return SparseRows(row_ptr, columns, values, width, smallest if rule == "batch_topk" else None)


@dataclass(frozen=True, eq=False)
class EncodeCall:
    """Arguments of the operator, in its order.

    Attributes:
        x: [n, d]. weight: [F, d]. bias: [F] or None.
        rule: one of RULES.
        count: of topk and batch_topk.
        pool: int32 [P], ascending, or None.
        threshold: float32 [] or [F], of the rule threshold.
        slots: of the rule threshold.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    rule: str
    count: int
    pool: Tensor | None
    threshold: Tensor | None
    slots: int

    @property
    def room(self) -> int:
        """Slots of the result."""
        rows, width = self.x.shape[0], (self.weight if self.pool is None else self.pool).shape[0]
        if self.rule == "topk":
            return rows * min(self.count, width)
        return min(self.count, rows * width) if self.rule == "batch_topk" else self.slots


def encode_select_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: str,
    count: int,
    pool: Tensor | None,
    threshold: Tensor | None,
    slots: int,
) -> Found:
    """The definition of `encode_select` in plain torch, on any device.

    Args:
        x, weight, bias, rule, count, pool, threshold, slots: as an `EncodeCall` has them.

    Returns:
        [slots], [], int64 [n + 1], int32 [slots].
    """
    a = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    if rule == "batch_topk":
        return batch_topk_reference(a, count, pool)
    if pool is not None:
        a = torch.zeros_like(a).index_copy(1, pool.long(), a.index_select(1, pool))
    if rule == "topk":
        values, row_ptr, columns = topk_reference(a, count)
        room = EncodeCall(x, weight, bias, rule, count, pool, threshold, slots).room
        return values[:room].clone(), a.new_zeros(()), row_ptr, columns[:room].clone()
    assert threshold is not None
    values, row_ptr, columns = threshold_select_reference(a, threshold, slots)
    return values, a.new_zeros(()), row_ptr, columns


def _cpu(*arguments: Any) -> Found:
    return _select(_run_native, EncodeCall(*arguments))


def _triton(*arguments: Any) -> Found:
    call = EncodeCall(*arguments)
    if not import_module(TRITON).supported(call.x, call.rule, call.count):
        return encode_select_reference(*arguments)
    return _select(_run_triton, call)


def _select(run: Callable[..., None], call: EncodeCall) -> Found:
    """What a kernel has to know nothing of: pools, and that there may be nothing."""
    x, weight, bias, rule = call.x, call.weight, call.bias, call.rule
    count, threshold, slots = call.count, call.threshold, call.room
    smallest = _alloc.empty((), dtype=x.dtype, device=x.device).zero_()
    pool = None if call.pool is not None and len(call.pool) == len(weight) else call.pool
    if pool is not None:
        weight = weight.index_select(0, pool)
        bias = None if bias is None else bias.index_select(0, pool)
        if threshold is not None and threshold.dim():
            threshold = threshold.index_select(0, pool)
    if rule == "topk":
        count = min(count, len(weight))
    elif rule == "batch_topk":
        count = slots
    if len(x) * len(weight) == 0 or (count == 0 and rule != "threshold"):
        values, row_ptr, columns = no_entries(x, slots)
        return values, smallest, row_ptr, columns
    values, row_ptr, columns = empty_rows(x, slots)
    threshold = None if threshold is None else threshold.contiguous()
    run(x, weight, bias, rule, count, threshold, (values, row_ptr, columns, smallest))
    if pool is not None:
        columns = torch.where(columns < 0, -1, pool[columns.clamp(min=0)])
    if rule == "batch_topk" and call.count > slots:
        smallest.zero_()
    return values, smallest, row_ptr, columns


def _run_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: str,
    count: int,
    threshold: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Shows the native selection one block of activations after the other, until it is sure."""
    threads, rows = torch.get_num_threads(), len(x)
    step = max(64, _BLOCK // (rows * x.element_size()) // 64 * 64)
    blocks = -(-len(weight) // step)
    room = out[0].shape[0] if rule == "threshold" else count
    selector = _native.BlockSelector(rule, x, rows, blocks, max(1, room), threshold)
    if rule == "batch_topk":
        some = x[:: max(1, min(64, rows // 4))]
        selector.sample(_encode(some, weight, bias), len(some) / rows, threads)
    only = list(_blocks(x, weight, bias, step)) if blocks == 1 else None  # read in each pass
    while True:
        selector.begin(threads)
        for first, block in only or _blocks(x, weight, bias, step):
            selector.add(first // step, block, first, threads)
        if selector.done(threads):
            break
    selector.emit(*out, threads)


def _run_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: str,
    count: int,
    threshold: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Shows each block of activations to the Triton selection, once."""
    kernel = import_module(TRITON)
    x, weight = dense_rows(x), dense_rows(weight)
    bias = None if bias is None else bias.contiguous()
    rows, width = len(x), len(weight)
    some = None
    if rule == "batch_topk":  # every row and latent looks like some eighth of them
        row, latent = (max(1, min(8, size // 64)) for size in (rows, width))
        some = _encode(x[::row], weight[::latent], None if bias is None else bias[::latent])
    selector = kernel.BlockSelector(x, weight, bias, rule, count, threshold, out[0].shape[0], some)
    step, _ = kernel.columns_of(rows, width, x.element_size())
    for first, block in _blocks(x, weight, bias, step):
        selector.add(block, first)
    selector.emit(*out)


def _blocks(
    x: Tensor, weight: Tensor, bias: Tensor | None, step: int
) -> Iterator[tuple[int, Tensor]]:
    """The activations of `step` latents after the other in one memory, and the first of each."""
    rows = len(x)
    block = _alloc.empty((rows * min(step, len(weight)),), dtype=x.dtype, device=x.device)
    for first in range(0, len(weight), step):
        part = weight[first : first + step]
        into = block[: rows * len(part)].view(rows, len(part))
        yield first, _encode(x, part, None if bias is None else bias[first : first + step], into)


def _encode(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)


def _fake(*arguments: Any) -> Found:
    call = EncodeCall(*arguments)
    smallest = _alloc.empty((), dtype=call.x.dtype, device=call.x.device)
    values, row_ptr, columns = empty_rows(call.x, call.room)
    return values, smallest, row_ptr, columns


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias = inputs[:3]
    _, smallest, row_ptr, columns = output
    ctx.mark_non_differentiable(smallest)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, row_ptr, columns)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple:
    x, weight, row_ptr, columns = ctx.saved_tensors
    needed, grad = ctx.needs_input_grad, grads[0]
    gradients: list[Tensor | None] = [None] * 8
    if grad is None:
        return tuple(gradients)
    ops, width = torch.ops.dreamreader, weight.shape[0]
    if needed[0]:
        gradients[0] = ops.sparse_decode(row_ptr, columns, grad, weight, None, x.dtype)
    if needed[1]:
        gradients[1] = ops.sparse_outer(row_ptr, columns, grad, x, width, weight.dtype)
    if ctx.has_bias and needed[2]:
        gradients[2] = ops.sparse_column_sums(row_ptr, columns, grad, width, weight.dtype)
    return tuple(gradients)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: str,
    count: int,
    pool: Tensor | None,
    threshold: Tensor | None,
    slots: int | None,
) -> None:
    """Raises InvalidInput unless the arguments belong together."""
    check_matrix("encode_select", x)
    check_matrix("encode_select", weight, "weight")
    for name, each in (("bias", bias), ("threshold", threshold), ("pool", pool)):
        if each is not None:
            check_tensor("encode_select", name, each, "a tensor or None")
    check_choice("encode_select", "rule", rule, RULES)
    for name, number in (("count", count), ("slots", 0 if slots is None else slots)):
        check_count("encode_select", name, number)
    if weight.shape[1] != x.shape[1]:
        raise InvalidInput(
            f"encode_select: x has {x.shape[1]} features, weight takes {weight.shape[1]}; it must "
            "be [d_sae, d_in]"
        )
    width = len(weight)
    if bias is not None and list(bias.shape) != [width]:
        raise InvalidInput(f"encode_select: bias must be [{width}], got {list(bias.shape)}")
    for name, each in (("weight", weight), ("bias", bias)):
        if each is not None and (each.dtype != x.dtype or each.device != x.device):
            raise InvalidInput(
                f"encode_select: {name} is {each.dtype} on {each.device}, x is {x.dtype} on "
                f"{x.device}; convert one of them"
            )
    if (threshold is None) == (rule == "threshold"):
        raise InvalidInput(
            "encode_select: a threshold goes with the rule threshold, and only there"
        )
    if threshold is not None:
        check_threshold("encode_select", threshold, x, width)
    if pool is not None:
        check_pool("encode_select", pool, x, width)


_native: Any = native()[0]

_encode_select = register(
    "encode_select",
    "(Tensor x, Tensor weight, Tensor? bias, str rule, int count, Tensor? pool, "
    "Tensor? threshold, int slots) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=encode_select_reference,
    fake=_fake,
    cpu=Kernel("BlockSelector", _cpu),
    triton=Kernel(TRITON, _triton),
    setup_context=_setup_context,
    backward=_backward,
    twice=_backward,
)
