"""What an edit says of the values from its own pass, and the memory of large results."""

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import dreamreader as dr
from dreamreader import _alloc
from dreamreader._register import native
from dreamreader.ops import Instruction, Program, intervene
from dreamreader.ops.intervention import (
    CHANGED,
    NOT_FINITE,
    OVERFLOWED,
    intervene_seen,
    look,
)
from tests.cases.intervention import CASES, KINDS, Case, lay_out

HALVES = [torch.bfloat16, torch.float16]
LAYOUTS = ["dense", "nchw", "unaligned", "every_second", "swapped"]
LARGE = (2, 2048, 1280)  # above what the C library keeps: 20 MiB
SMALL = (2, 2048, 96)  # below a huge page: 1.5 MiB, half of it in half precision


def seen_of(x: Tensor, program: Program) -> tuple[Tensor, int]:
    seen = torch.zeros(3, dtype=torch.int32)
    y = intervene_seen(x, program, seen, 1)
    assert seen[0] == seen[2] == 0
    return y, int(seen[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_the_result_is_that_of_intervene_and_change_is_told(dtype: torch.dtype, isa: str):
    for case in CASES:
        check_seen(case, dtype)


def check_seen(case: Case, dtype: torch.dtype) -> None:
    x, program = case.input(dtype), case.program()
    want = intervene(x, program)
    got, bits = seen_of(x, program)
    assert got.stride() == want.stride()
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7)), case.name
    touched = (program.strength != 0).any(0).expand(x.shape[:2])  # no NaN elsewhere is a change
    assert bool(bits & CHANGED) == bool((x != want)[touched].any()), case.name
    if dtype in HALVES and not bits & NOT_FINITE:
        assert bool(bits & OVERFLOWED) == (bool(x.isfinite().all() & ~want.isfinite().all()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["elementwise", "with_sums", "subspace"])
def test_one_overflow_in_a_touched_row_is_told(kind: str, dtype: torch.dtype, layout: str, isa):
    torch.manual_seed(0)
    x = torch.randn(2, 37, 130)
    x[1, 36, 129] = 0.9 * torch.finfo(dtype).max
    strength = torch.ones(2, 37)
    strength[0, ::2] = 0
    first = Instruction("scale", strength, lo=2.0)
    unit = torch.eye(130)
    rest = {
        "elementwise": [],
        "with_sums": [Instruction("project", strength, vectors=unit[0])],
        "subspace": [Instruction("project", strength, vectors=unit[:3])],
    }[kind]
    program = Program([first, *rest], rows=2, tokens=37, width=130)
    assert seen_of(lay_out(x.to(dtype), layout), program)[1] == CHANGED | OVERFLOWED
    x[1, 36, 129] = 1.0
    assert seen_of(lay_out(x.to(dtype), layout), program)[1] == CHANGED
    x[1, 3, 5] = torch.inf  # what was not finite before is no overflow
    assert seen_of(lay_out(x.to(dtype), layout), program)[1] & NOT_FINITE
    x[1, 3, 5], x[0, 0, 5] = 1.0, torch.nan  # a row that the edit leaves alone
    assert seen_of(lay_out(x.to(dtype), layout), program)[1] == CHANGED


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_edit_below_the_rounding_changes_nothing(layout: str, isa):
    x = lay_out(torch.ones(2, 40, 70, dtype=torch.bfloat16), layout)
    tiny = Program(
        [Instruction("steer", vectors=torch.full((70,), 1e-6))], rows=2, tokens=40, width=70
    )
    assert seen_of(x, tiny)[1] == 0


def test_bits_are_added_and_the_definition_says_the_same():
    x = torch.tensor([[[4e4, 1.0]]], dtype=torch.float16)
    double = Program([Instruction("scale", lo=2.0)], rows=1, tokens=1, width=2)
    seen = torch.zeros(2, dtype=torch.int32)
    y = intervene_seen(x, double, seen, 0)
    look(x, y, seen, 1)
    assert seen.tolist() == [CHANGED | OVERFLOWED] * 2
    look(y, y, seen, 1)
    assert int(seen[1]) == CHANGED | OVERFLOWED | NOT_FINITE


def test_where_gradients_follow_it_says_the_same():
    x = torch.tensor([[[4e4, 1.0]]], dtype=torch.float16, requires_grad=True)
    double = Program([Instruction("scale", lo=2.0)], rows=1, tokens=1, width=2)
    y, bits = seen_of(x, double)
    assert bits == CHANGED | OVERFLOWED
    y[..., 1].sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[[0.0, 2.0]]]


# memory of large results


@pytest.fixture
def pool() -> Iterator[None]:
    if not hasattr(native()[0], "reused"):
        pytest.skip("the native module is not built")
    gc.collect()
    yield


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_memory_is_used_again_only_when_nobody_holds_it(pool: None, shape: tuple[int, ...]):
    x = torch.zeros(shape)
    first = _alloc.empty_like(x)
    where = first.data_ptr()
    view = first[1, 5:9].T
    del first
    assert _alloc.empty_like(x).data_ptr() != where
    storage = view.untyped_storage()
    del view
    assert _alloc.empty_like(x).data_ptr() != where
    del storage
    others = [_alloc.empty_like(x) for _ in range(8)]
    assert where in {each.data_ptr() for each in others}


def test_memory_may_be_freed_by_another_thread(pool: None):
    held = [_alloc.empty_like(torch.zeros(LARGE))]
    worker = threading.Thread(target=held.clear)
    worker.start()
    worker.join()
    assert torch.equal(_alloc.empty_like(torch.zeros(LARGE)).fill_(1.0), torch.ones(LARGE))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_results_look_as_those_of_torch(
    pool: None, shape: tuple[int, int, int], dtype: torch.dtype, layout: str
):
    x = lay_out(torch.zeros(shape, dtype=dtype), layout)
    got, want = _alloc.empty_like(x), torch.empty_like(x)
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    assert got.storage_offset() == 0 and not got._is_view() and not got.requires_grad


class Keeping(nn.Module):
    """Hands its outputs on and keeps them, as step caches and residual streams do."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.second = nn.Identity()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.kept += [h, h[:, ::2], h.flatten(0, 1)]
        y = self.second(h)  # the same tensor where nothing edits it
        self.kept += [y, y.transpose(1, 2)]
        return h + y


@torch.no_grad()
def test_what_a_model_keeps_of_edited_values_never_changes(pool: None):
    torch.manual_seed(0)
    model = Keeping(LARGE[2])
    reader = dr.Reader(model)
    edits = [
        dr.Steer("first", torch.ones(LARGE[2])),
        dr.Steer("second", torch.ones(LARGE[2]), alpha=2.0),
    ]
    copies: list[Tensor] = []
    results = []
    with reader.recording(["first", "second"]) as cache, reader.editing(edits):
        for _ in range(3):
            results.append(model(torch.randn(*LARGE[:2], 8)))
            copies += [each.clone() for each in model.kept[-5:]]
    assert all(torch.equal(a, b) for a, b in zip(model.kept, copies, strict=True))
    for number in range(3):
        first, second = model.kept[5 * number], model.kept[5 * number + 3]
        assert torch.equal(first + second, results[number])
        assert torch.equal(second, first + 2.0)
    assert cache["first"].tensor.shape[0] == 6


@torch.no_grad()
@pytest.mark.parametrize("as_function", [False, True])
def test_a_session_finds_the_one_call_among_many(as_function: bool):
    model = nn.Sequential(nn.Identity()).half()
    edit = (
        dr.Edit("0", lambda x, place: x + 0.01)
        if as_function
        else dr.Steer("0", torch.full((8,), 0.01))
    )
    big, zero = torch.full((1, 3, 8), 1000.0).half(), torch.zeros(1, 3, 8).half()
    calls = {299: zero}
    with dr.Reader(model).editing(edit) as report:
        for number in range(600):
            model(calls.get(number, big))
    assert report[0].calls == 600 and report[0].notes == []
    with dr.Reader(model).editing(edit) as report:
        for _ in range(300):
            model(big)
    assert report[0].notes == ["strength above 0, but no value changed"]


@torch.no_grad()
@pytest.mark.parametrize("as_function", [False, True])
def test_a_session_finds_the_one_overflow_among_many(as_function: bool):
    model = nn.Sequential(nn.Identity()).half()
    edit = dr.Edit("0", lambda x, place: x * 2) if as_function else dr.Scale("0", 2.0)
    small, big = torch.ones(1, 3, 8).half(), torch.full((1, 3, 8), 4e4).half()
    for overflow, notes in ((400, ["overflow to infinity at steps 0"]), (-1, [])):
        with dr.Reader(model).editing(edit) as report:
            for number in range(600):
                model(big if number == overflow else small)
        assert report[0].notes == notes


@pytest.mark.parametrize("layout", ["dense", "nchw"])
@pytest.mark.parametrize("kind", ["steer", "fill", "zero", "overwrite_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_too_large_for_the_caches_are_the_same(dtype: torch.dtype, kind: str, layout: str):
    """From 16 MiB on they are written past them; those of the parts here are not."""
    width = 1040 * 4 // dtype.itemsize
    case = Case(kind, (2, 2048, width), KINDS[kind], layout)
    x, program = case.input(dtype), case.program()
    code, strength, vectors, limits, *others = program.tables(dtype)
    whole, seen = seen_of(x, program)
    assert seen == CHANGED
    for row in range(2):
        for tokens in (slice(0, 500), slice(500, 2048)):
            cut = (slice(row, row + 1), tokens)
            tables = (strength[:, *cut], vectors, limits.new_empty(0, 2, 1), *others)
            part = torch.ops.dreamreader.intervene(x[cut], code, *tables)
            assert torch.equal(whole[cut], part)
    torch.ops.dreamreader.intervene_(x, *program.tables(dtype))
    assert torch.equal(x, whole)
