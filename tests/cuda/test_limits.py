"""What the CUDA launchers do on devices with less shared memory, on the twin; and two GPUs."""

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch

from dreamreader._register import native
from dreamreader.ops import Instruction, Program, intervene, intervene_, intervene_reference
from dreamreader.ops.low_rank import NEEDS, low_rank_backward_reference, low_rank_reference
from tests.cases._compare import assert_close
from tests.cases.intervention import KINDS
from tests.cases.intervention import Case as Edit
from tests.cases.low_rank import Case as LowRank
from tests.twin import limit_shared
from tests.twin.intervention import build
from tests.twin.low_rank import LowRankTwin

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
# By capability: what a block may ask for, in KiB.
LIMITS = {"7.5": 64, "8.0": 163, "8.6": 99, "9.0": 227}
TOO_LARGE = "CUDA error 801"  # cudaErrorNotSupported


@pytest.fixture(scope="module")
def intervention() -> Callable[..., int]:
    return build()


@pytest.fixture(scope="module")
def low_rank() -> LowRankTwin:
    return LowRankTwin()


@pytest.fixture(params=LIMITS)
def limit(request, intervention, low_rank) -> Iterator[int]:
    """KiB that a block may have; the twin fails a launch that asks for more."""
    for name in ("intervention", "low_rank"):
        limit_shared(name, LIMITS[request.param] << 10)
    yield LIMITS[request.param]
    for name in ("intervention", "low_rank"):
        limit_shared(name, 227 << 10)


# Rows that have no runs of 16 bytes lie in shared memory, 4 bytes an element (8 of float64), beside
# the sums of each warp. Feature maps share a block among tokens, as many as fit.
EDITS = [  # KiB that one row needs at least
    (Edit("odd_map", (1, 33, 1000), KINDS["renorm_twice"], "nchw"), torch.float32, 0),
    (Edit("odd_map", (1, 33, 320), KINDS["three"], "nchw"), torch.bfloat16, 0),
    (Edit("no_sums", (1, 33, 4000), KINDS["scale"], "nchw"), torch.float64, 0),
    (Edit("wide", (1, 2, 17001), KINDS["renorm_twice"], "every_second"), torch.bfloat16, 67),
    (Edit("wider", (1, 2, 20001), KINDS["renorm_twice"], "every_second"), torch.bfloat16, 79),
    (Edit("widest", (1, 1, 32767), KINDS["renorm_twice"], "every_second"), torch.float32, 129),
    (Edit("double", (1, 1, 16383), KINDS["renorm_twice"]), torch.float64, 129),
]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype", "least"), EDITS, ids=lambda each: getattr(each, "name", None)
)
def test_an_intervention_fits_the_device_or_leaves_the_call(
    case: Edit, dtype: torch.dtype, least: int, limit: int, intervention: Callable[..., int]
):
    x, program = case.input(dtype), case.program()
    tables, out = program.tables(dtype), torch.full_like(x, torch.nan)
    if least > limit:
        with pytest.raises(AssertionError, match=TOO_LARGE):
            intervention(x, out, *tables)
        assert out.isnan().all()
        return
    assert intervention(x, out, *tables) == 1
    exact = intervene_reference(x.double(), *program.tables(torch.float64))
    assert_close(out, intervene_reference(x, *tables), exact)


ADAPTERS = [  # KiB that the fewest rows of a tile need, four of them
    (LowRank("many", (1, 70, 1024), 33), torch.bfloat16, 0),
    (LowRank("wide", (1, 40, 4096), 33), torch.bfloat16, 0),
    (LowRank("wide_float", (1, 9, 6144), 4), torch.float32, 96),
    (LowRank("widest_float", (1, 5, 8192), 64), torch.float32, 129),
]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype", "least"), ADAPTERS, ids=lambda each: getattr(each, "name", None)
)
def test_a_low_rank_edit_fits_the_device_or_leaves_the_call(
    case: LowRank, dtype: torch.dtype, least: int, limit: int, low_rank: LowRankTwin
):
    (x, *tables), grad = case.inputs(dtype), case.gradient(dtype)
    out, dx = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    results = (dx, *(torch.full_like(each, torch.nan) for each in tables[:4]))
    if least > limit:
        for call in (
            lambda: low_rank.low_rank(x, out, *tables),
            lambda: low_rank.backward(grad, x, *tables, *results),
        ):
            with pytest.raises(AssertionError, match=TOO_LARGE):
                call()
        assert all(each.isnan().all() for each in (out, *results))
        return
    wide = [each.double() if each.is_floating_point() else each for each in tables]
    low_rank.low_rank(x, out, *tables)
    assert_close(out, low_rank_reference(x, *tables), low_rank_reference(x.double(), *wide))
    low_rank.backward(grad, x, *tables, *results)
    same = low_rank_backward_reference(grad, x, *tables, needs=NEEDS)
    exact = low_rank_backward_reference(grad.double(), x.double(), *wide, needs=NEEDS)
    for found, one, other in zip(results, same, exact, strict=True):
        assert_close(found, one, other)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_the_device_of_x_decides_and_the_current_one_stays():
    program = [Instruction("renorm"), Instruction("scale", lo=2.0)]
    x = torch.randn(2, 5, 640)
    want = intervene(x, Program(program, rows=2, tokens=5, width=640))
    for current, other in ((0, 1), (1, 0), (0, 1)):
        with torch.cuda.device(current):
            for device in (other, current, other):
                there = x.to(f"cuda:{device}")
                own = Program(program, rows=2, tokens=5, width=640, device=there.device)
                torch.testing.assert_close(intervene(there, own).cpu(), want)
                torch.testing.assert_close(intervene_(there, own).cpu(), want)
                assert torch.cuda.current_device() == current


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_that_no_block_holds_run_on_the_reference():
    assert native()[0] is not None
    program = [Instruction("renorm"), Instruction("scale", lo=2.0)]
    x = torch.randn(1, 2, 65537)
    want = intervene(x, Program(program, rows=1, tokens=2, width=65537))
    own = Program(program, rows=1, tokens=2, width=65537, device="cuda")
    torch.testing.assert_close(intervene(x.cuda(), own).cpu(), want)
    torch.testing.assert_close(intervene_(x.cuda(), own).cpu(), want)
