"""Products of sparse rows with dense ones, without a tensor [rows, width] or [slots, d].

With entries e of row i(e) and column f(e) and their values v_e,

    decode        y_i = bias + sum_{e: i(e) = i} v_e W_{f(e)}        [rows, d]
    dots          p_e = <x_{i(e)}, W_{f(e)}>                         [slots]
    outer         G_f = sum_{e: f(e) = f} v_e x_{i(e)}               [width, d]
    column sums   s_f = sum_{e: f(e) = f} v_e                        [width]

The gradients of the first three are the first three, so they can be differentiated again and again.
Sums run in float32 (float64 for float64) in ascending order of the entries and are rounded once;
two runs give the same bits. Slots of no entry, and entries with a negative column, do not exist.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader._register import Kernel, register
from dreamreader.errors import InvalidInput
from dreamreader.ops import _sparse_product_kernels as kernels
from dreamreader.ops._arguments import check_tensor, refuse
from dreamreader.ops._sparse_product_reference import (
    is_entry,
    sparse_column_sums_reference,
    sparse_decode_backward_reference,
    sparse_decode_reference,
    sparse_dots_reference,
    sparse_outer_reference,
    work_type,
)
from dreamreader.ops._types import FLOATS, NEEDED
from dreamreader.ops.sparse_rows import SparseRows

PLACES = "Tensor row_ptr, Tensor columns"


def sparse_decode(
    codes: SparseRows,
    weight: Float[Tensor, "width d"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "rows d"]:
    """Sums rows of a matrix, weighted by the values of sparse rows.

    Formula: y_i = bias + sum_e v_e W_{f(e)} over the entries e of row i, in float32, rounded once.

    Args:
        codes: sparse rows, `width` columns; float64 if and only if `weight` is.
        weight: W, one row for each column; float32, bfloat16, float16 or float64. Rows whose values
            do not lie one after the other are copied first.
        bias: added to each row.
        dtype: of the result; that of `weight` by default.

    Returns:
        A new tensor [rows, d]. Differentiable in the values, `weight` and `bias`, also twice.

    Raises:
        InvalidInput: shapes, dtypes or devices that do not fit, a column beyond the last row of
            `weight`, or more entries than slots.

    Example:
        >>> import torch
        >>> codes = SparseRows.from_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
        >>> sparse_decode(codes, torch.tensor([[1.0, 1.0], [1.0, 3.0]]), torch.tensor([0.5, 0.0]))
        tensor([[2.5000, 6.0000],
                [0.5000, 0.0000]])
    """
    _check_codes("sparse_decode", codes, dtype)
    _check("sparse_decode", codes, codes.values, weight=(weight, codes.width))
    if bias is not None:
        check_tensor("sparse_decode", "bias", bias, "a tensor or None")
    if bias is not None and (bias.shape != weight.shape[1:] or bias.device != weight.device):
        raise InvalidInput(
            f"sparse_decode: weight has {weight.shape[1]} columns on {weight.device}, so bias must "
            f"be [{weight.shape[1]}] there, got {list(bias.shape)} on {bias.device}"
        )
    return _sparse_decode(codes.row_ptr, codes.columns, codes.values, weight, bias, dtype)


def sparse_dots(
    codes: SparseRows,
    rows: Float[Tensor, "rows d"],
    weight: Float[Tensor, "width d"],
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, " slots"]:
    """Takes the product of two matrices at the places of sparse rows alone.

    Formula: p_e = <x_{i(e)}, W_{f(e)}>, in float32, rounded once; 0 in slots of no entry.

    Args:
        codes: sparse rows whose places are used; their values are not.
        rows: x, one for each row of `codes`; float32, bfloat16, float16 or float64.
        weight: W, one row for each column of `codes`; float64 if and only if `rows` is.
        dtype: of the result; by default the wider one of `rows` and `weight`.

    Returns:
        A new tensor [slots]. Differentiable in `rows` and `weight`, also twice.

    Raises:
        InvalidInput: shapes, dtypes or devices that do not fit, a column beyond the last row of
            `weight`, or more entries than slots.

    Example:
        >>> import torch
        >>> codes = SparseRows.from_dense(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        >>> x, weight = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]])
        >>> sparse_dots(codes, x, weight)
        tensor([20., 20., 40.])
    """
    _check_codes("sparse_dots", codes, dtype)
    check_tensor("sparse_dots", "rows", rows)
    _check("sparse_dots", codes, rows, rows=(rows, codes.rows), weight=(weight, codes.width))
    if rows.shape[1] != weight.shape[1]:
        raise InvalidInput(
            f"sparse_dots: rows have {rows.shape[1]} columns, weight has {weight.shape[1]}"
        )
    return _sparse_dots(codes.row_ptr, codes.columns, rows, weight, dtype)


def sparse_outer(
    codes: SparseRows, rows: Float[Tensor, "rows d"], *, dtype: torch.dtype | None = None
) -> Float[Tensor, "width d"]:
    """Sums dense rows by column of sparse ones, weighted by their values.

    Formula: G_f = sum_e v_e x_{i(e)} over the entries e of column f in ascending order of rows, in
    float32, rounded once: the transpose of `codes` times `rows`.

    Args:
        codes: sparse rows; float64 if and only if `rows` is.
        rows: x, one for each row of `codes`; float32, bfloat16, float16 or float64.
        dtype: of the result; that of `rows` by default.

    Returns:
        A new tensor [width, d], 0 in columns without entries. Differentiable in the values and
        `rows`, also twice.

    Raises:
        InvalidInput: shapes, dtypes or devices that do not fit, or more entries than slots.

    Example:
        >>> import torch
        >>> codes = SparseRows.from_dense(torch.tensor([[0.0, 2.0], [0.0, 3.0]]))
        >>> sparse_outer(codes, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[0., 0.],
                [2., 3.]])
    """
    _check_codes("sparse_outer", codes, dtype)
    _check("sparse_outer", codes, codes.values, rows=(rows, codes.rows))
    return _sparse_outer(codes.row_ptr, codes.columns, codes.values, rows, codes.width, dtype)


def sparse_column_sums(
    codes: SparseRows, *, dtype: torch.dtype | None = None
) -> Float[Tensor, " width"]:
    """Sums the values of sparse rows by column.

    Formula: s_f = sum_e v_e over the entries e of column f in ascending order, in float32 (float64
    for float64), rounded once.

    Args:
        codes: sparse rows.
        dtype: of the result; that of the values by default.

    Returns:
        A new tensor [width]. Differentiable in the values, also twice.

    Raises:
        InvalidInput: a column that is not below the width, or more entries than slots.

    Example:
        >>> import torch
        >>> sparse_column_sums(SparseRows.from_dense(torch.tensor([[0.0, 2.0], [1.0, 3.0]])))
        tensor([1., 5.])
    """
    _check_codes("sparse_column_sums", codes, dtype)
    _check("sparse_column_sums", codes, codes.values)
    return _sparse_column_sums(codes.row_ptr, codes.columns, codes.values, codes.width, dtype)


def _check_codes(name: str, codes: SparseRows, dtype: torch.dtype | None) -> None:
    """Raises InvalidInput unless `codes` are sparse rows, and `dtype` is one for a result."""
    if not isinstance(codes, SparseRows):
        refuse(name, "codes", "SparseRows, as topk and SparseRows.from_dense give them", codes)
    if dtype is not None and dtype not in FLOATS:
        refuse(name, "dtype", f"{NEEDED} of torch, or None", dtype)


def _check(name: str, codes: SparseRows, first: Tensor, **matrices: tuple[Tensor, int]) -> None:
    """Raises InvalidInput unless the matrices, with as many rows as said, fit to `codes`."""
    for label, (matrix, _) in matrices.items():
        check_tensor(name, label, matrix)
    if first.dtype not in FLOATS:
        raise InvalidInput(f"{name}: values must be {NEEDED}, got {first.dtype}")
    for label, (matrix, count) in matrices.items():
        if matrix.dim() != 2 or len(matrix) != count or matrix.dtype not in FLOATS:
            raise InvalidInput(
                f"{name}: codes have {codes.rows} rows and {codes.width} columns, so {label} must "
                f"be [{count}, d] of {NEEDED}; got {matrix.dtype} {list(matrix.shape)}"
            )
        if matrix.device != codes.values.device:
            raise InvalidInput(
                f"{name}: codes are on {codes.values.device}, {label} is on {matrix.device}"
            )
        if (matrix.dtype == torch.float64) != (first.dtype == torch.float64):
            raise InvalidInput(
                f"{name}: {label} is {matrix.dtype} beside {first.dtype}; float64 goes with "
                "float64 alone, so convert one of them"
            )


def _fake_decode(row_ptr, columns, values, weight, bias, dtype) -> Tensor:
    return weight.new_empty((row_ptr.shape[0] - 1, weight.shape[1]), dtype=dtype or weight.dtype)


def _fake_dots(row_ptr, columns, rows, weight, dtype) -> Tensor:
    dtype = dtype or torch.promote_types(rows.dtype, weight.dtype)
    return rows.new_empty(columns.shape, dtype=dtype)


def _fake_outer(row_ptr, columns, values, rows, width, dtype) -> Tensor:
    return rows.new_empty((width, rows.shape[1]), dtype=dtype or rows.dtype)


def _fake_column_sums(row_ptr, columns, values, width, dtype) -> Tensor:
    return values.new_empty((width,), dtype=dtype or values.dtype)


def _fake_decode_backward(grad, row_ptr, columns, values, weight) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), weight.new_empty(weight.shape)


def _setup_decode(ctx, inputs, output) -> None:
    row_ptr, columns, values, weight, bias, _ = inputs
    ctx.bias_type = None if bias is None else bias.dtype
    ctx.save_for_backward(row_ptr, columns, values, weight)


def _backward_decode(ctx, grad: Tensor) -> tuple:
    row_ptr, columns, values, weight = ctx.saved_tensors
    _, _, for_values, for_weight, _, _ = ctx.needs_input_grad
    if not (for_values and for_weight):
        return _twice_decode(ctx, grad)
    d_values, d_weight = _sparse_decode_backward(grad, row_ptr, columns, values, weight)
    return None, None, d_values, d_weight, _d_bias(ctx, grad), None


def _twice_decode(ctx, grad: Tensor) -> tuple:
    """`_backward_decode` in operators that have gradients themselves."""
    row_ptr, columns, values, weight = ctx.saved_tensors
    _, _, for_values, for_weight, _, _ = ctx.needs_input_grad
    d_values = d_weight = None
    if for_values:
        d_values = _sparse_dots(row_ptr, columns, grad, weight, values.dtype)
    if for_weight:
        d_weight = _sparse_outer(row_ptr, columns, values, grad, len(weight), weight.dtype)
    return None, None, d_values, d_weight, _d_bias(ctx, grad), None


def _d_bias(ctx, grad: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[4]:
        return None
    return grad.sum(0, dtype=work_type(grad)).to(ctx.bias_type)


def _setup_dots(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward_dots(ctx, grad: Tensor) -> tuple:
    row_ptr, columns, rows, weight = ctx.saved_tensors
    _, _, for_rows, for_weight, _ = ctx.needs_input_grad
    d_rows = d_weight = None
    if for_rows:
        d_rows = _sparse_decode(row_ptr, columns, grad, weight, None, rows.dtype)
    if for_weight:
        d_weight = _sparse_outer(row_ptr, columns, grad, rows, len(weight), weight.dtype)
    return None, None, d_rows, d_weight, None


def _setup_outer(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward_outer(ctx, grad: Tensor) -> tuple:
    row_ptr, columns, values, rows = ctx.saved_tensors
    _, _, for_values, for_rows, _, _ = ctx.needs_input_grad
    d_values = d_rows = None
    if for_values:
        d_values = _sparse_dots(row_ptr, columns, rows, grad, values.dtype)
    if for_rows:
        d_rows = _sparse_decode(row_ptr, columns, values, grad, None, rows.dtype)
    return None, None, d_values, d_rows, None, None


def _setup_column_sums(ctx, inputs, output) -> None:
    row_ptr, columns, values, *_ = inputs
    ctx.value_type = values.dtype
    ctx.save_for_backward(row_ptr, columns)


def _backward_column_sums(ctx, grad: Tensor) -> tuple:
    row_ptr, columns = ctx.saved_tensors
    there = is_entry(row_ptr, columns)
    behind = torch.cat([grad, grad.new_zeros(1)])  # what slots of no entry get
    d_values = behind[torch.where(there, columns, len(grad)).long()]
    return None, None, d_values.to(ctx.value_type), None, None


_sparse_decode = register(
    "sparse_decode",
    f"({PLACES}, Tensor values, Tensor weight, Tensor? bias, ScalarType? dtype) -> Tensor",
    reference=sparse_decode_reference,
    fake=_fake_decode,
    cpu=Kernel("sparse_decode_cpu", kernels.cpu_decode),
    triton=Kernel(kernels.TRITON, kernels.triton_decode),
    setup_context=_setup_decode,
    backward=_backward_decode,
    twice=_twice_decode,
)
_sparse_decode_backward = register(
    "sparse_decode_backward",
    f"(Tensor grad, {PLACES}, Tensor values, Tensor weight) -> (Tensor, Tensor)",
    reference=sparse_decode_backward_reference,
    fake=_fake_decode_backward,
    cpu=Kernel("sparse_decode_backward_cpu", kernels.cpu_decode_backward),
    triton=Kernel(kernels.TRITON, kernels.triton_decode_backward),
)
_sparse_dots = register(
    "sparse_dots",
    f"({PLACES}, Tensor rows, Tensor weight, ScalarType? dtype) -> Tensor",
    reference=sparse_dots_reference,
    fake=_fake_dots,
    cpu=Kernel("sparse_dots_cpu", kernels.cpu_dots),
    triton=Kernel(kernels.TRITON, kernels.triton_dots),
    setup_context=_setup_dots,
    backward=_backward_dots,
    twice=_backward_dots,
)
_sparse_outer = register(
    "sparse_outer",
    f"({PLACES}, Tensor values, Tensor rows, int width, ScalarType? dtype) -> Tensor",
    reference=sparse_outer_reference,
    fake=_fake_outer,
    cpu=Kernel("sparse_outer_cpu", kernels.cpu_outer),
    triton=Kernel(kernels.TRITON, kernels.triton_outer),
    setup_context=_setup_outer,
    backward=_backward_outer,
    twice=_backward_outer,
)
_sparse_column_sums = register(
    "sparse_column_sums",
    f"({PLACES}, Tensor values, int width, ScalarType? dtype) -> Tensor",
    reference=sparse_column_sums_reference,
    fake=_fake_column_sums,
    cpu=Kernel("sparse_column_sums_cpu", kernels.cpu_column_sums),
    triton=Kernel(kernels.TRITON, kernels.triton_column_sums),
    setup_context=_setup_column_sums,
    backward=_backward_column_sums,
    twice=_backward_column_sums,
)
