"""Encoding and selecting in Triton: many blocks, guesses that fail, and compiled ahead of time."""

import sys

import pytest
import torch

from dreamreader.ops import encode_select, encode_select_reference
from tests.cases._matrices import identical
from tests.cases.encode_select import Case
from tests.triton_kernels.harness import compiled, interpreted
from tests.triton_kernels.selection import (
    VALUES,
    by_type,
    compile_selection,
    registered,
    small_blocks,
)

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, str rule, int count, Tensor? pool, "
    "Tensor? threshold, int slots) -> (Tensor, Tensor, Tensor, Tensor)"
)


def run(case: Case, dtype: torch.dtype) -> None:
    """Raises AssertionError unless the kernels give what the definition gives."""
    found = sys.modules["dreamreader.ops.encode_select"]._triton(*case.arguments(dtype))
    wanted = encode_select_reference(*case.arguments(dtype))
    identical(case, list(found), list(wanted), [])


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamreader.triton_kernels import encode_select as module

    small_blocks(monkeypatch)
    for name, value in {"BLOCK": 32, "LEAST": 32, "BYTES": 1, "TILE": (16, 16, 16)}.items():
        monkeypatch.setattr(module, name, value)


@interpreted
@pytest.mark.parametrize(("rule", "count"), [("topk", 5), ("batch_topk", 40), ("threshold", 0)])
def test_interpreter_gives_the_same_for_many_blocks(rule: str, count: int, blocks: None):
    for odd in (0.0, torch.nan):
        run(Case((3, 6, 100), rule, count, odd=odd, each=True), torch.bfloat16)
    run(Case((3, 6, 100), rule, count, 0.6, bias=False), torch.float32)


@interpreted
@pytest.mark.parametrize(("rank", "room"), [(1, 300), (300, 7)], ids=["too_few", "no_room"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreter_encodes_again_where_a_guess_fails(
    monkeypatch: pytest.MonkeyPatch, blocks: None, rank: int, room: int, dtype: torch.dtype
):
    from dreamreader.triton_kernels import encode_select as module

    monkeypatch.setattr(module, "guess", lambda *sizes: (rank, room))
    run(Case((19, 6, 50), "batch_topk", 60), dtype)
    run(Case((3, 20, 50), "batch_topk", 60, odd=torch.nan, bias=False), dtype)
    run(Case((3, 6, 20), "batch_topk", 60), dtype)  # no more are positive


@interpreted
def test_the_sample_is_of_some_rows_and_latents():
    run(Case((130, 2, 140), "batch_topk", 300), torch.float32)


@interpreted
def test_gradients_of_the_interpreter():
    call = registered(sys.modules["dreamreader.ops.encode_select"], SCHEMA)
    learned = [torch.randn(shape).requires_grad_() for shape in ((4, 5), (30, 5), (30,))]
    factor = torch.arange(20.0)
    values = call(*learned, "batch_topk", 20, None, None, 0)[0]
    found = torch.autograd.grad((values * factor).sum(), learned)
    codes = encode_select(*learned, count=20)
    wanted = torch.autograd.grad((codes.values * factor).sum(), learned)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@compiled
@by_type
def test_compiles_within_limits(dtype: str, arch: int):
    from dreamreader.triton_kernels import encode_select as module

    digits = 2 if dtype == "bf16" else 4
    types = dict.fromkeys(VALUES, f"*{dtype}") | {"tally_ptr": "*i64"}
    rows, columns, features = module.TILE
    for what in (0, digits - 1, digits, digits + 1):
        ptx = compile_selection(
            module._again_kernel,
            dtype,
            arch,
            module.WARPS,
            types,
            WHAT=what,
            DIGITS=digits,
            BIAS=True,
            WIDEN=False,
            ROWS=rows,
            COLUMNS=columns,
            FEATURES=features,
        )
        assert ("mma" in ptx) == (dtype == "bf16")
