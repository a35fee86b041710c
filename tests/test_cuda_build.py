"""The CUDA kernels without a GPU.

They compile without spills, link into the native module, and their own source gives the results of
the reference on the CPU, where every thread is a fiber (tests/twin).
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dreamreader.ops import Instruction, Program, intervene_reference
from tests import twin
from tests.cases._compare import assert_close, assert_seen, same_bits
from tests.cases.intervention import (
    CASES,
    KINDS,
    Case,
    direction,
    head,
    masked,
    projection,
    scattered,
)
from tests.ops import test_attention_words as words

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
FLAGS = "-std=c++20 -O3 -Werror all-warnings -Xptxas -v,-warn-spills --threads 2"
ARCHS = (
    "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a "
    "-gencode arch=compute_90,code=compute_90"
)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(CSRC.rglob("*.cu")), ids=lambda path: path.name)
def test_compiles_without_warnings_and_spills(source: Path, tmp_path: Path):
    assert NVCC
    command = [NVCC, *FLAGS.split(), *ARCHS.split(), '-DDREAMREADER_CUDA="test"']
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(tmp_path / "out.o")], capture_output=True, text=True
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-4000:]
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill \w+, (\d+) bytes spill", report
    )
    assert spills and set(spills) == {("0", "0", "0")}, report[-4000:]


def recent_cmake() -> str | None:
    """The cmake beside this Python, else the one on the path, if it is recent enough."""
    for found in (
        shutil.which("cmake", path=str(Path(sys.executable).parent)),
        shutil.which("cmake"),
    ):
        if found:
            text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
            version = re.search(r"(\d+)\.(\d+)", text)
            if version and tuple(map(int, version.groups())) >= (3, 26):
                return found
    return None


def cuda_module(build: Path) -> Path:
    """The native module with CUDA: the installed one, or one that is built here."""
    from dreamreader._register import native

    installed = native()[0]
    if installed is not None and installed.build_info()["cuda"] is not None:
        return Path(installed.__file__)
    pytest.importorskip("pybind11")
    cmake = recent_cmake()
    if cmake is None:
        pytest.skip("cmake 3.26 or later is not installed")
    settings = [
        "-DDREAMREADER_WITH_CUDA=ON",
        "-DDREAMREADER_CUDA_ARCHS=90a-real",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    where = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for command in (
        [cmake, "-S", str(CSRC), "-B", str(build), f"-Dpybind11_DIR={where}", *settings],
        [cmake, "--build", str(build), "-j", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return next(build.rglob("_C*.so"))


@needs_nvcc
@pytest.mark.slow
def test_native_module_with_cuda_imports_without_a_driver(tmp_path: Path):
    module = cuda_module(tmp_path / "build")
    code = (
        "import _C; print(_C.build_info()); "
        "ops = ('intervene', 'attention_words', 'pack', 'low_rank', 'low_rank_backward'); "
        "assert all(hasattr(_C, f'{op}_cuda') for op in ops)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(module.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    linked = subprocess.run(["ldd", str(module)], capture_output=True, text=True).stdout
    assert "libcudart" not in linked and "libcuda.so" not in linked


# Programs and shapes for what the case list leaves out: 16-byte runs along channels and along
# tokens, blocks of several warps, several blocks along the channels, four rows at a time, and rows
# wider than the registers of a block.
PROGRAMS = {
    "steer": KINDS["steer"],
    "three": KINDS["three"],
    "renorm_twice": KINDS["renorm_twice"],
    "patch_bf16": KINDS["patch_bf16"],
    "overwrite_last": KINDS["overwrite_last"],
    "project_then_head": lambda c, g: [
        Instruction("project", vectors=direction(c, g)),
        Instruction("fill", vectors=torch.zeros(c.shape[2]), channels=head(c, g)),
    ],
    "fill-scattered": masked("fill", scattered),
    "project-scattered": masked("project", scattered),
    "subspace_20": projection(20),
}
SHAPES = [
    ((2, 3, 1280), "dense"),
    ((1, 6, 3072), "dense"),
    ((1, 2, 4104), "dense"),
    ((1, 2, 15360), "dense"),
    ((2, 3, 2001), "every_second"),
    ((1, 64, 320), "nchw"),
    ((2, 16, 1280), "nchw"),
    ((1, 40, 2560), "nchw"),
    ((1, 50, 200), "nchw"),
]
WIDE = [
    Case(f"{name}-{shape}", shape, make, layout)
    for shape, layout in SHAPES
    for name, make in PROGRAMS.items()
]


@pytest.fixture(scope="module")
def intervention(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """The CUDA launcher on the CPU; it returns the number of launches."""
    return twin.build(tmp_path_factory.mktemp("twin"))


def check(case: Case, dtype: torch.dtype, intervention: Callable[..., int]) -> None:
    program, x = case.program(), case.input(dtype)
    tables, before = program.tables(dtype), x.clone()
    same = intervene_reference(x, *tables)
    exact = intervene_reference(x.double(), *program.tables(torch.float64))
    out = torch.empty_like(x).fill_(torch.nan)
    seen = torch.zeros(1, dtype=torch.int32)
    launches = intervention(x, out, *tables, seen)
    assert launches == (1 if x.numel() else 0), case.name
    assert same_bits(x, before), case.name
    assert_close(out, same, exact)
    assert_seen(x, out, (program.strength != 0).any(0).expand(x.shape[:2]), int(seen))
    idle = (program.strength == 0).all(0)
    assert same_bits(out[idle], before[idle]), case.name
    intervention(x, x, *tables)  # blocks and threads run in another order now
    assert same_bits(x, out), case.name


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", twin.DTYPES, ids=str)
def test_twin_agrees_with_the_reference(dtype: torch.dtype, intervention: Callable[..., int]):
    for case in CASES if dtype in (torch.float32, torch.bfloat16) else CASES[::4]:
        check(case, dtype, intervention)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_twin_agrees_on_wide_rows(dtype: torch.dtype, intervention: Callable[..., int]):
    for case in WIDE:
        check(case, dtype, intervention)


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


@pytest.fixture(scope="module")
def attention_words(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """The CUDA launcher of the attention maps on the CPU; it returns the number of launches."""
    return twin.build_words(tmp_path_factory.mktemp("twin"))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_twin_of_attention_words(dtype: torch.dtype, attention_words: Callable[..., int]):
    cases = words.cases_for(dtype)
    for number, case in enumerate(cases if dtype == torch.float32 else cases[::3] + cases[-1:]):
        factor = float(number % 2)
        out, operands = case.out(dtype, factor), case.operands(dtype)
        around = None if out._base is None else out._base.clone()
        launches = attention_words(out, *operands)
        extents = (*case.sizes[:2], *case.sizes[3:5], case.sizes.words)
        assert launches == (1 if all(extents) else 0), case.name
        assert_close(out, *words.expected(case, dtype, factor))
        if around is not None:  # memory between the elements of out
            where = (out.size(), out.stride(), out.storage_offset())
            assert same_bits(around.as_strided_scatter(out, *where), out._base), case.name
        if number % 8 == 0:  # blocks and threads run in another order now
            again = case.out(dtype, factor)
            attention_words(again, *operands)
            assert same_bits(again, out), case.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", twin.DTYPES, ids=str)
def test_gpu_repeats_in_one_launch_without_synchronising(dtype: torch.dtype):
    from torch.profiler import ProfilerActivity, profile

    for case in CASES + (WIDE if dtype in (torch.bfloat16, torch.float32) else []):
        program, x = case.program(), case.input(dtype)
        if x.numel() == 0:
            continue
        same = intervene_reference(x, *program.tables(dtype))
        exact = intervene_reference(x.double(), *program.tables(torch.float64))
        code, *floats, patches = program.tables(dtype)
        tables = [code, *(each.cuda() for each in floats), [each.cuda() for each in patches]]
        there = torch.empty_strided(x.size(), x.stride(), dtype=dtype, device="cuda").copy_(x)
        first = torch.ops.dreamreader.intervene(there, *tables)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            torch.cuda.set_sync_debug_mode("error")
            second = torch.ops.dreamreader.intervene(there, *tables)
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        kernels = [event for event in seen.events() if "intervention_kernel" in event.name]
        assert len(kernels) == 1, case.name
        assert same_bits(first, second), case.name
        assert_close(first.cpu(), same, exact)
