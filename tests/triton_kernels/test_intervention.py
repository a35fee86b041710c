"""The Triton kernel of the intervention program: what it moves, and compiled ahead of time."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.ops import Instruction, Program
from tests.cases._compare import assert_seen
from tests.cases.intervention import CASES, KINDS, Case, direction, head, masked, subspace
from tests.triton_kernels.harness import compile_ahead, compiled, interpreted, within_limits


def traffic(monkeypatch: pytest.MonkeyPatch, x: Tensor, call) -> tuple[int, int]:
    """Elements of x that the interpreted kernel reads and writes."""
    from triton.runtime.interpreter import InterpreterBuilder

    begin = x.untyped_storage().data_ptr()
    end = begin + x.untyped_storage().nbytes()
    counts = {"create_masked_load": 0, "create_masked_store": 0}
    for name in counts:
        original = getattr(InterpreterBuilder, name)

        def counted(self, pointers, *rest, name=name, original=original):
            mask = rest[0] if name == "create_masked_load" else rest[1]
            at = pointers.data
            counts[name] += int(((at >= begin) & (at < end) & mask.data).sum())
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, counted)
    call()
    return counts["create_masked_load"], counts["create_masked_store"]


@interpreted
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_what_an_edit_does_is_told_in_its_pass(dtype: torch.dtype):
    from dreamreader.triton_kernels.intervention import intervention

    for case in CASES[::8] if dtype == torch.float32 else CASES[4::8]:
        program, x = case.program(), case.input(dtype)
        out, seen = torch.empty_like(x), torch.zeros(3, dtype=torch.int32)
        intervention(x, out, *program.tables(dtype), seen=seen, at=1)
        assert_seen(x, out, (program.strength != 0).any(0).expand(x.shape[:2]), int(seen[1]))
        assert seen[0] == seen[2] == 0, case.name


HALF = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
FIRST = torch.arange(24) < 8
# Instructions on [1, 4, 24], elements that may be read and written in place.
TRAFFIC = {
    "nothing": ([Instruction("clamp", 0.0, lo=0.0)], 0, 0),
    "zero": ([Instruction("fill", vectors=torch.zeros(24))], 0, 96),
    "patch": ([Instruction("patch", source=torch.ones(2, 24), index=torch.tensor([[1]]))], 0, 96),
    "blend": ([Instruction("fill", 0.5, vectors=torch.zeros(24))], 96, 96),
    "half of the tokens": ([Instruction("scale", HALF, lo=2.0)], 48, 48),
    "overwritten": (
        [Instruction("scale", lo=2.0), Instruction("fill", HALF, vectors=torch.ones(24))],
        48,
        96,
    ),
    "a head": ([Instruction("scale", lo=2.0, channels=FIRST)], 32, 32),
    "a zero head": ([Instruction("fill", vectors=torch.zeros(24), channels=FIRST)], 0, 32),
    "a sum over a zero head": (
        [
            Instruction("project", vectors=torch.full((24,), 24**-0.5)),
            Instruction("fill", vectors=torch.zeros(24), channels=FIRST),
        ],
        96,
        96,
    ),
    "a norm": ([Instruction("fill", vectors=torch.ones(24)), Instruction("renorm", HALF)], 48, 96),
}


@interpreted
@pytest.mark.parametrize("name", TRAFFIC)
def test_interpreter_moves_no_more_than_the_steps_need(name: str, monkeypatch: pytest.MonkeyPatch):
    from dreamreader.triton_kernels.intervention import intervention

    instructions, reads, writes = TRAFFIC[name]
    program = Program(instructions, rows=1, tokens=4, width=24)
    x = torch.randn(1, 4, 24)
    tables = program.tables(x.dtype)
    assert traffic(monkeypatch, x, lambda: intervention(x, x, *tables)) == (reads, writes)


@interpreted
def test_interpreter_turns_a_missing_patch_entry_into_nan():
    from dreamreader.triton_kernels.intervention import intervention

    patch = Instruction("patch", source=torch.ones(2, 8), index=torch.tensor([[0, 1, 0]]))
    code, *tables, (source, _) = Program([patch], rows=1, tokens=3, width=8).tables(torch.float32)
    x = torch.zeros(1, 3, 8)
    intervention(x, x, code, *tables, [source, torch.tensor([[0, -1, 2]])])
    assert (x[0, 0] == 1).all() and x[0, 1:].isnan().all()


@interpreted
def test_interpreter_names_a_table_that_is_not_contiguous():
    from dreamreader.triton_kernels.intervention import intervention

    code, strength, _, *rest = Program(
        [Instruction("steer", vectors=torch.ones(8))], rows=1, tokens=1, width=8
    ).tables(torch.float32)
    x = torch.zeros(1, 1, 8)
    with pytest.raises(InvalidInput, match=r"vectors must be contiguous, has strides \(1, 1\)"):
        intervention(x, x, code, strength, torch.ones(9).as_strided((2, 8), (1, 1)), *rest)


def test_top_level_import_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "import dreamreader.triton_kernels" in done.stderr


def machine_code(case: Case, dtype: str, arch: int, copy: bool = False):
    """The kernel of a case for a GPU with compute capability arch / 10, and its launch settings.

    Pointers and sizes are declared multiples of 16, as Triton finds them where they are.
    """
    from dreamreader.triton_kernels import intervention as module

    program, (_, tokens, width) = case.program(), case.shape
    nchw = case.layout == "nchw"
    steps, _ = module.constants(program.code, width)
    settings = module.launch_settings(program.code, tokens, width, along_tokens=nchw, seen=copy)
    sources = len(program.patches) // 2
    strides = ("i64", "constexpr", "i64") if nchw else ("i64", "i64", "constexpr")
    unit = 1 if nchw else 2
    signature = {
        "x_ptr": f"*{dtype}",
        "out_ptr": f"*{dtype}",
        "strength_ptr": "*fp32",
        "vectors_ptr": "*fp32",
        "limits_ptr": "*fp32",
        "masks_ptr": "*i1",
        "sources": ("*fp32",) * sources,
        "indices": ("*i64",) * sources,
        "rows": "i32",
        "tokens": "i32",
        "width": "i32",
        "x_strides": strides,
        "out_strides": strides,
        "strength_strides": ("i64",) * 3,
        "source_sizes": (("i64", "i64", "constexpr"),) * sources,
        "index_strides": (("i64", "i64"),) * sources,
        "ranges": (("i32", "i32"),) * len(steps),
        "seen_ptr": "*i32",
        "at": "i32",
        "STEPS": "constexpr",
        "COPY": "constexpr",
        "SEEN": "constexpr",
        "BLOCK_T": "constexpr",
        "BLOCK_D": "constexpr",
    }
    constants = {
        ("x_strides", unit): 1,
        ("out_strides", unit): 1,
        **{("source_sizes", n, 2): 1 for n in range(sources)},
        ("STEPS",): steps,
        ("COPY",): copy,
        ("SEEN",): copy,
        ("BLOCK_T",): settings.block_t,
        ("BLOCK_D",): settings.block_d,
    }
    even = [
        (name,) for name in ("x_ptr", "out_ptr", "strength_ptr", "vectors_ptr", "tokens", "width")
    ]
    even += [
        (name, axis) for name in ("x_strides", "out_strides") for axis in range(3) if axis != unit
    ]
    even += [("sources", n) for n in range(sources)]
    even += [("source_sizes", n, 1) for n in range(sources)]
    even += [("ranges", n, side) for n in range(len(steps)) for side in (0, 1)]
    kernel = module._intervention_kernel
    assert list(signature) == kernel.arg_names
    return compile_ahead(kernel, signature, constants, even, arch, num_warps=settings.warps)


PROGRAMS = {
    **{
        kind: KINDS[kind]
        for kind in ("steer", "clamp", "project", "zero", "patch", "three", "renorm")
    },
    "head": masked("fill", head),
    "subspace_64": lambda c, g: [Instruction("project", vectors=subspace(c, g, 64))],
    "unmasked_scale": lambda c, g: [
        Instruction("scale", lo=0.5),
        Instruction("steer", vectors=direction(c, g)),
    ],
}


@compiled
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, (1, 64, 1280)) for name in PROGRAMS),
        *((name, (1, 64, 3072)) for name in ("steer", "three", "subspace_64")),
        *((name, (1, 16, 16384)) for name in ("zero", "three")),
    ],
)
def test_rows_move_in_16_bytes(name: str, shape: tuple[int, int, int]):
    code = machine_code(Case(name, shape, PROGRAMS[name]), "bf16", 90)
    text = code.asm["ptx"]
    stores = Counter(re.findall(r"st\.global[.\w:]*", text))
    assert stores and all(each.endswith((".v4.b32", ".v2.b64")) for each in stores), stores
    # x and vectors; the narrow loads are strengths, limits and patch indices.
    assert re.search(r"ld\.global[.\w:]*\.v(4\.b32|2\.b64)", text) or name == "zero"
    assert not re.search(r"ld\.global[.\w:]*\.b(8|16)\b", text)
    within_limits(code, 90)


@compiled
@pytest.mark.parametrize(
    ("name", "arch"), [*((name, 90) for name in PROGRAMS), ("steer", 80), ("three", 80)]
)
def test_feature_maps_compile_within_limits(name: str, arch: int):
    for shape in ((1, 4096, 320), (1, 1024, 1280)):
        within_limits(
            machine_code(Case(name, shape, PROGRAMS[name], "nchw"), "bf16", arch, copy=True), arch
        )


@compiled
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_other_dtypes_compile(dtype: str):
    within_limits(machine_code(Case("three", (1, 64, 1280), KINDS["three"]), dtype, 90), 90)
