"""The Triton kernels of the low-rank edit: what they leave out, and compiled ahead of time."""

import re
from typing import Any

import pytest
import torch

from tests.cases._compare import same_bits
from tests.cases.low_rank import Case, poisoned
from tests.triton_kernels.harness import ROWS, WIDE, ahead, compiled, interpreted, within_limits


@interpreted
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (4,), (1, 2, 4)], ids=str)
def test_interpreter_writes_only_the_gradients_that_are_asked_for(wanted: tuple[int, ...]):
    from dreamreader.triton_kernels.low_rank import low_rank_backward

    case = Case("some", (2, 9, 40), 5)
    (x, *tables), grad = case.inputs(torch.float32), case.gradient(torch.float32)
    kept = tables[3].clone()
    every, some = (poisoned(grad, tables) for _ in range(2))
    low_rank_backward(grad, x, *(*tables, *every))
    asked: list[Any] = [some[n] if n in wanted else None for n in range(5)]
    low_rank_backward(grad, x, *(*tables, *asked))
    for n in range(5):
        assert same_bits(some[n], every[n]) if n in wanted else some[n].isnan().all(), n
    assert same_bits(tables[3], kept) and same_bits(grad, case.gradient(torch.float32))


@interpreted
def test_interpreter_turns_rows_of_a_missing_adapter_into_nan():
    from dreamreader.triton_kernels.low_rank import low_rank, low_rank_backward

    x, *tables, _ = Case("missing", (3, 2, 8), 2, strength="one", adapters=2).inputs(torch.float32)
    tables.append(torch.tensor([1, 2, -1]))
    dx, *tables_of = poisoned(x, tables)
    low_rank_backward(x, x, *(*tables, dx, *tables_of))
    low_rank(x, x, *tables)
    for rows in (x, dx):
        assert rows[0].isfinite().all() and rows[1:].isnan().all()
    assert all(each.isfinite().all() for each in tables_of[:3])


TABLES = {
    **dict.fromkeys(("down_ptr", "bias_ptr", "up_ptr", "strength_ptr"), "*fp32"),
    "index_ptr": "*i64",
}
STRIDES = {"strength_strides": ("i64", "i64"), "index_stride": "i64"}
SIZES = dict.fromkeys(("tokens", "width", "rank", "adapters"), "i32")
HALF_WIDE = r"ld\.global[.\w:]*\.v(4\.b32|2\.b64|2\.b32)"


def kernels_ahead(dtype: str, rank: int, arch: int) -> dict[str, Any]:
    """The three kernels for rows of `dtype`."""
    from dreamreader.triton_kernels import low_rank as module

    chosen = module.launch_settings(4096, rank)
    blocks = {"R": chosen.r, "BLOCK_T": chosen.block_t, "BLOCK_D": chosen.block_d}
    edit = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"} | TABLES | SIZES | STRIDES
    edit |= {"x_strides": ROWS, "out_strides": ROWS}
    rows = {name: f"*{dtype}" for name in ("grad_ptr", "x_ptr", "dx_ptr")} | TABLES | SIZES
    rows |= dict.fromkeys(("d_strength_ptr", "d_ptr", "heard_ptr"), "*fp32") | STRIDES
    rows |= dict.fromkeys(("grad_strides", "x_strides", "dx_strides"), ROWS)
    names = ("coefficients_ptr", "strength_ptr", "table_ptr", "bias_ptr")
    sums = {"rows_ptr": f"*{dtype}"} | dict.fromkeys(names, "*fp32") | SIZES | STRIDES
    sums |= {"index_ptr": "*i64", "count": "i32", "rows_strides": ROWS}
    warps = {"num_warps": chosen.warps, "num_stages": 1}
    wanted = dict.fromkeys(("HIDDEN", "DX", "DS"), True)
    return {
        "edit": ahead(module._low_rank_kernel, edit, blocks | {"COPY": True}, arch, **warps),
        "rows": ahead(module._low_rank_rows_kernel, rows, blocks | wanted, arch, **warps),
        "sums": ahead(module._low_rank_sums_kernel, sums, blocks | {"BIAS": True}, arch, **warps),
    }


@compiled
@pytest.mark.parametrize(
    ("dtype", "rank", "arch"),
    [("bf16", 8, 90), ("bf16", 64, 90), ("fp32", 32, 90), ("fp32", 64, 80), ("fp16", 32, 80)],
)
def test_compiles_within_limits(dtype: str, rank: int, arch: int):
    for name, code in kernels_ahead(dtype, rank, arch).items():
        within_limits(code, arch)
        assert re.search(r"mma(\.sync|_async)", code.asm["ptx"]), name
        # Tiles for more than 16 ranks leave a thread four channels.
        assert re.search(WIDE if rank <= 16 else HALF_WIDE, code.asm["ptx"]), name
        assert not re.search(r"ld\.global[.\w:]*\.b(8|16)\b", code.asm["ptx"]), name
