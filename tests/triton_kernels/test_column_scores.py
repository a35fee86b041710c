"""The Triton kernel of the scores of columns: parts of the rows, and compiled ahead of time."""

import re

import pytest
import torch

from dreamreader.ops import column_scores_reference
from tests.cases._compare import assert_close
from tests.cases._matrices import matrix
from tests.triton_kernels.harness import WIDE, compile_ahead, compiled, interpreted, within_limits


@interpreted
@pytest.mark.parametrize("score", ["l2", "entropy"])
def test_interpreter_adds_parts_up(monkeypatch: pytest.MonkeyPatch, score: str):
    from dreamreader.triton_kernels import column_scores as module

    monkeypatch.setattr(module, "PARTS", 3)
    x, found = matrix("normal", (100, 9), torch.float32), torch.full((9,), torch.nan)
    module.column_scores(x, score, found)
    wanted = column_scores_reference(x, score)
    assert_close(found, wanted, column_scores_reference(x.double(), score), 4)


@compiled
@pytest.mark.parametrize(("dtype", "arch"), [("bf16", 90), ("fp32", 80)], ids=str)
@pytest.mark.parametrize("entropy", [True, False])
def test_compiles_within_limits(dtype: str, arch: int, entropy: bool):
    from dreamreader.triton_kernels import column_scores as module

    sizes = dict.fromkeys(("rows", "width", "per", "stride"), "i32")
    code = compile_ahead(
        module._sums_kernel,
        {"x_ptr": f"*{dtype}", "part_ptr": "*fp64", **sizes},
        {("ENTROPY",): entropy, ("STEP",): module.STEP, ("BLOCK",): module.BLOCK},
        [("x_ptr",), ("part_ptr",), ("width",), ("stride",)],
        arch,
        num_warps=4,
    )
    within_limits(code, arch)
    assert re.search(WIDE, code.asm["ptx"])
