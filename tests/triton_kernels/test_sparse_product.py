"""The Triton kernels of the products of sparse rows: what leads out of memory, and compiled ahead
of time."""

import re
from typing import Any

import pytest
import torch

from tests.cases._compare import same_bits
from tests.cases.sparse_product import Case
from tests.triton_kernels.harness import WIDE, compile_ahead, compiled, interpreted, within_limits


@interpreted
def test_interpreter_makes_what_leads_out_of_memory_nan():
    from dreamreader.triton_kernels.sparse_product import sparse_decode, sparse_dots

    row_ptr, columns, values, weight, bias, _ = Case(
        "out", (5, 9, 20), most=3, counts="full"
    ).decode(torch.float32)
    rows, out = torch.ones(5, 20), torch.empty(5, 20)
    columns[4] = 9  # in row 1
    sparse_decode(row_ptr, columns, values, weight, bias, out)
    assert out.isnan().all(1).tolist() == [False, True, False, False, False]
    dots = torch.empty(len(columns))
    sparse_dots(row_ptr, columns, rows, weight, dots)
    assert dots.isnan().nonzero().flatten().tolist() == [4]
    columns[4] = 8
    sparse_decode(row_ptr + (row_ptr == 15) * 4, columns, values, weight, bias, out)
    assert out.isnan().all(1).tolist() == [False, False, False, False, True]


@interpreted
@pytest.mark.parametrize("chunk", [16, 48])
def test_interpreter_gives_the_same_for_chunks_of_a_column(
    monkeypatch: pytest.MonkeyPatch, chunk: int
):
    from dreamreader.triton_kernels import sparse_product as module

    case = Case("chunks", (130, 6, 20), most=4, heavy=True)
    row_ptr, columns, values, rows, width, _ = case.outer(torch.float32)
    whole, cut, again = (torch.full((width, 20), torch.nan) for _ in range(3))
    module.sparse_outer(row_ptr, columns, values, rows, whole)
    monkeypatch.setattr(module, "CHUNK", chunk)
    for out in (cut, again):
        module.sparse_outer(row_ptr, columns, values, rows, out)
    torch.testing.assert_close(cut, whole)
    assert same_bits(cut, again) and not same_bits(cut, whole)


def machine_code(name: str, dtype: str, arch: int, d: int = 1280) -> Any:
    """One kernel for matrices of `dtype`."""
    from dreamreader.triton_kernels import sparse_product as module

    chosen = module.launch_settings(d)
    matrix, pointers = f"*{dtype}", {"row_ptr": "*i64", "column_ptr": "*i32", "value_ptr": "*fp32"}
    sorted_by_column = {"first_ptr": "*i64", "chunk_ptr": "*i64", "index_ptr": "*i64"}
    sizes = {name: "i32" for name in ("slots", "width", "count", "d")}
    strides = {"weight_stride": "i32", "rows_stride": "i32"}
    kernel = getattr(module, f"_{name}_kernel")
    everything = {
        **pointers,
        **sorted_by_column,
        **dict.fromkeys(("weight_ptr", "bias_ptr", "rows_ptr", "out_ptr"), matrix),
        "part_ptr": "*fp32",
        "owner_ptr": "*i64",
        **sizes,
        **strides,
    }
    signature = {name: everything[name] for name in kernel.arg_names if name in everything}
    constants = {"BLOCK_E": chosen.block_e, "BLOCK_D": chosen.block_d}
    constants |= {"decode": {"BIAS": True}, "dots": {"GROUPS": 8}}.get(name, {"SIZE": module.CHUNK})
    even = [(each,) for each in signature if each.endswith("ptr") or each in ("d", *strides)]
    fixed: dict[tuple, Any] = {(each,): value for each, value in constants.items()}
    return compile_ahead(kernel, signature, fixed, even, arch, num_warps=chosen.warps)


@compiled
@pytest.mark.parametrize("name", ["decode", "dots", "chunks", "outer"])
@pytest.mark.parametrize(("dtype", "arch"), [("bf16", 90), ("fp32", 80)], ids=str)
def test_compiles_within_limits(name: str, dtype: str, arch: int):
    code = machine_code(name, dtype, arch)
    within_limits(code, arch)
    assert re.search(WIDE, code.asm["ptx"])
