"""Every case of the intervention program on every back end, against the reference in float64."""

import pytest
import torch
from torch import Tensor

from dreamreader.ops import intervene, intervene_, intervene_reference
from tests.cases import CASES
from tests.cases._compare import assert_close
from tests.cases.intervention import Case

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

by_case = pytest.mark.parametrize("case", CASES["intervention"], ids=lambda case: case.name)
by_dtype = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaNs included."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def check(case: Case, dtype: torch.dtype) -> None:
    program, x = case.program(), case.input(dtype)
    before = x.clone()
    same = intervene_reference(x, *program.tables(dtype))
    exact = intervene_reference(x.double(), *program.tables(torch.float64))
    out = intervene(x, program)
    assert same_bits(x, before)
    assert out.dtype == dtype and out.stride() == torch.empty_like(x).stride()
    assert_close(out, same, exact)
    idle = (program.strength == 0).all(0)
    assert same_bits(out[idle], before[idle])
    assert intervene_(x, program) is x
    assert same_bits(x, out)


@by_case
@by_dtype
def test_active_backend(case: Case, dtype: torch.dtype, poisoned: None):
    check(case, dtype)


@by_dtype
def test_every_instruction_set(isa: str, dtype: torch.dtype, poisoned: None):
    for case in CASES["intervention"]:
        check(case, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@by_dtype
def test_cuda(dtype: torch.dtype, poisoned: None):
    for case in CASES["intervention"]:
        program, x = case.program(), case.input(dtype)
        same = intervene_reference(x, *program.tables(dtype))
        exact = intervene_reference(x.double(), *program.tables(torch.float64))
        code, *tables, patches = program.tables(dtype)
        tables = [code, *(each.cuda() for each in tables), [each.cuda() for each in patches]]
        there = torch.empty_strided(x.size(), x.stride(), dtype=dtype, device="cuda").copy_(x)
        assert_close(torch.ops.dreamreader.intervene(there, *tables).cpu(), same, exact)
        torch.ops.dreamreader.intervene_(there, *tables)
        assert_close(there.cpu(), same, exact)


GRADIENT = [case for case in CASES["intervention"] if case.shape in ((2, 33, 72), (3, 5, 123))]
SMALL = [
    Case(case.name, (2, 4, 11), case.make, case.layout)
    for case in GRADIENT
    if case.layout in ("dense", "nchw") and "64" not in case.name
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gradient(case: Case):
    program = case.program()
    code, *floats, masks, patches = program.tables(torch.float64)
    x = case.input(torch.float64).requires_grad_()
    strength, vectors, limits = (each.clone() for each in floats)
    inputs = [x, strength.requires_grad_(), *([vectors.requires_grad_()] if len(vectors) else [])]
    inputs += [each.double().requires_grad_() for each in patches[::2]]

    def apply(x: Tensor, strength: Tensor, *rest: Tensor) -> Tensor:
        v = rest[0] if len(vectors) else vectors
        sources = rest[len(rest) - len(patches) // 2 :] if patches else ()
        pairs = [each for pair in zip(sources, patches[1::2], strict=True) for each in pair]
        return torch.ops.dreamreader.intervene(x, code, strength, v, limits, masks, pairs)

    assert torch.autograd.gradcheck(apply, inputs)


@pytest.mark.parametrize("kind", ["three", "patch", "renorm", "subspace_9-nchw"])
def test_opcheck(kind: str):
    case = next(case for case in CASES["intervention"] if case.name == kind)
    tables = case.program().tables(torch.float32)
    x = case.input(torch.float32)
    torch.library.opcheck(torch.ops.dreamreader.intervene_.default, (x.clone(), *tables))
    torch.library.opcheck(torch.ops.dreamreader.intervene.default, (x.requires_grad_(), *tables))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["three", "patch-nchw"])
def test_compiles_without_graph_breaks(kind: str):
    case = next(case for case in CASES["intervention"] if case.name == kind)
    tables = case.program().tables(torch.float32)

    def twice(x: Tensor) -> Tensor:
        y = torch.ops.dreamreader.intervene(x, *tables)
        torch.ops.dreamreader.intervene_(y, *tables)
        return y + 1

    x = case.input(torch.float32)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), twice(x))
