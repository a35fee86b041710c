"""The CUDA kernel of the intervention program: its memory on the twin, its launches on a GPU."""

import shutil
from collections.abc import Callable

import pytest
import torch

from dreamreader.ops import Instruction, Program, intervene_reference
from dreamreader.ops._types import FLOATS
from tests.cases._compare import assert_seen
from tests.cases.intervention import PROGRAMS, Case, wide_too
from tests.ops.harness import named, needs_gpu, to_device
from tests.twin import intervention as twin

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def intervention() -> Callable[..., int]:
    """The CUDA launcher on the CPU; it returns the number of launches."""
    return twin.build()


@needs_compiler
def test_twin_keeps_to_its_memory(intervention: Callable[..., int]):
    """Around a slice of a larger tensor nothing changes, and what lies there is not used."""
    for name, make in PROGRAMS.items():
        case = Case(name, (2, 24, 64), make)
        for tokens_last in (False, True):
            shape = (2, 64, 40) if tokens_last else (2, 40, 80)
            wide = torch.full(shape, torch.nan, dtype=torch.bfloat16)
            x = wide[..., 8:32].transpose(1, 2) if tokens_last else wide[:, 8:32, 8:72]
            x.copy_(case.input(torch.bfloat16))
            expected = intervene_reference(x, *case.program().tables(x.dtype))
            intervention(x, x, *case.program().tables(x.dtype))
            assert torch.isfinite(x).all() and (x - expected).abs().max() < 0.1, name
            assert wide.isnan().sum() == wide.numel() - x.numel(), name


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_twin_tells_in_its_pass_what_an_edit_does(intervention: Callable[..., int], dtype):
    for case in wide_too(dtype)[:: 2 if dtype == torch.bfloat16 else 5]:
        program, x = case.program(), case.input(dtype)
        out, seen = torch.empty_like(x), torch.zeros(1, dtype=torch.int32)
        intervention(x, out, *program.tables(dtype), seen)
        assert_seen(x, out, (program.strength != 0).any(0).expand(x.shape[:2]), int(seen))


@needs_compiler
def test_twin_turns_a_missing_patch_entry_into_nan(intervention: Callable[..., int]):
    patch = Instruction("patch", source=torch.ones(2, 8), index=torch.tensor([[0, 1, 0]]))
    code, *tables, (source, _) = Program([patch], rows=1, tokens=3, width=8).tables(torch.float32)
    x = torch.zeros(1, 3, 8)
    intervention(x, x, code, *tables, [source, torch.tensor([[0, -1, 2]])])
    assert (x[0, 0] == 1).all() and x[0, 1:].isnan().all()


@needs_compiler
def test_twin_refuses_sums_over_rows_that_no_block_holds(intervention: Callable[..., int]):
    program = Program([Instruction("renorm")], rows=1, tokens=1, width=32769)
    x = torch.zeros(1, 1, 32769)
    with pytest.raises(AssertionError, match="CUDA error 801"):
        intervention(x, x, *program.tables(x.dtype))
    scale = Program([Instruction("scale", lo=2.0)], rows=1, tokens=1, width=32769)
    x.fill_(1)
    intervention(x, x, *scale.tables(x.dtype))
    assert (x == 2).all()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=named)
def test_gpu_takes_one_launch_without_synchronising(dtype: torch.dtype):
    from torch.profiler import ProfilerActivity, profile

    for case in wide_too(dtype):
        x, *tables = to_device((case.input(dtype), *case.program().tables(dtype)))
        if x.numel() == 0:
            continue
        torch.ops.dreamreader.intervene(x, *tables)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            torch.cuda.set_sync_debug_mode("error")
            torch.ops.dreamreader.intervene(x, *tables)
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        kernels = [event for event in seen.events() if "intervention_kernel" in event.name]
        assert len(kernels) == 1, case.name
