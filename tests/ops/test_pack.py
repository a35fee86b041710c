"""The packing of rows: every case, instruction set and type; its formats; what must be refused."""

import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamreader import _register
from dreamreader.errors import InvalidInput
from dreamreader.ops import pack, pack_reference
from dreamreader.ops._types import FLOATS
from dreamreader.ops.pack import MOST, STORED
from tests import twin
from tests.cases import CASES
from tests.cases._compare import assert_close
from tests.cases.pack import Case

NATIVE = _register.native()[0]
NEEDS_NATIVE = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


by_source = pytest.mark.parametrize("source", FLOATS, ids=named)
by_stored = pytest.mark.parametrize("stored", STORED, ids=named)


def bits_of(t: Tensor) -> Tensor:
    """The bits, every NaN of a wider type alike."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()]
    bits = t.contiguous().view(integer)
    return bits if t.element_size() == 1 else bits.masked_fill(t.isnan(), -1)


def check(case: Case, source: torch.dtype, stored: torch.dtype, call: Callable) -> None:
    x, places, minus, groups = case.inputs(source)
    got, want = case.outputs(stored), case.outputs(stored)
    call(*got, x, places, minus, groups, case.pool_number)
    pack_reference(*want, x, places, minus, groups, case.pool_number)
    assert torch.equal(got.not_finite, want.not_finite), case.name
    memory = torch.empty(0, dtype=stored).set_(got.out.untyped_storage()).float()
    assert memory[0] == memory[-1] == 72, case.name
    if case.pool != "mean":
        assert torch.equal(bits_of(got.out), bits_of(want.out)), case.name
        if got.scales is not None:
            assert torch.equal(got.scales, want.scales), case.name
    elif stored not in MOST:
        exact = case.outputs(stored)
        minus = None if minus is None else minus.double()
        pack_reference(*exact, x.double(), places, minus, groups, case.pool_number)
        assert_close(got.out, want.out, exact.out.double())
    else:  # one unit of the row's largest number, which the scale is made of
        assert got.scales is not None and want.scales is not None
        assert torch.allclose(got.scales, want.scales, rtol=1e-6), case.name
        near = (got.out.float() - want.out.float()).abs() <= want.out.float().abs().clamp(min=8) / 8
        assert (near | (got.out.float().isnan() & want.out.float().isnan())).all(), case.name


def operator(*operands: object) -> None:
    torch.ops.dreamreader.pack(*operands)


@by_source
@by_stored
def test_active_backend(source: torch.dtype, stored: torch.dtype):
    for case in CASES["pack"]:
        check(case, source, stored, operator)


@pytest.mark.parametrize("isa", ["portable", "avx2"], indirect=True)
@by_source
@by_stored
def test_every_instruction_set(isa: str, source: torch.dtype, stored: torch.dtype):
    for case in CASES["pack"]:
        check(case, source, stored, operator)


@pytest.fixture(scope="module")
def on_twin(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """The CUDA launcher on the CPU; it returns the number of launches."""
    return twin.build_pack(tmp_path_factory.mktemp("twin"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_twin_of_the_cuda_kernels(on_twin: Callable[..., int]):
    pairs = [(source, stored) for source in FLOATS for stored in STORED]
    cases = [case for case in CASES["pack"] if case.name != "threads"]
    for number, case in enumerate(cases):  # each case in a few types, all types over the cases
        for source, stored in pairs[number % 4 :: 4]:
            check(case, source, stored, on_twin)
        x, places, minus, groups = case.inputs(torch.float32)
        out = case.outputs(torch.float32)
        launches = on_twin(*out, x, places, minus, groups, case.pool_number)
        assert launches == (1 if len(out.out) else 0), case.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@by_source
@by_stored
def test_cuda(source: torch.dtype, stored: torch.dtype):
    def call(out, scales, not_finite, *operands):
        there = [None if each is None else each.cuda() for each in (out, scales, not_finite)]
        inputs = [each.cuda() if isinstance(each, Tensor) else each for each in operands]
        inputs[0] = torch.empty_strided(
            operands[0].size(), operands[0].stride(), dtype=source, device="cuda"
        ).copy_(operands[0])
        torch.ops.dreamreader.pack(*there, *inputs)
        for here, copy in zip((out, scales, not_finite), there, strict=True):
            if here is not None:
                here.copy_(copy)

    for case in CASES["pack"]:
        if case.layout != "expanded":
            check(case, source, stored, call)


def all_rounded(values: Tensor, stored: torch.dtype) -> Tensor:
    """Every value as a row of its own, so that for types with a scale it is chosen by a partner."""
    x = values.reshape(1, -1, 1)
    places = torch.stack([torch.zeros(values.numel()), torch.arange(values.numel())], 1).int()
    return pack(x, places, out=torch.empty(values.numel(), 1, dtype=stored))[:, 0]


def test_float64_is_rounded_once():
    """Just beside the middle of two numbers, rounding to float32 first would choose the other."""
    for stored in (torch.bfloat16, torch.float16):
        low = torch.tensor([1.0, 1.5, -3.0, 1024.0, 6e-8]).to(stored)
        # The middle, and a hair to either side that float32 does not see.
        high = (low.view(torch.int16) + 1).view(stored)
        middle = (low.double() + high.double()) / 2
        for hair, want in ((2.0**-40, high), (-(2.0**-40), low)):
            assert torch.equal(all_rounded(middle * (1 + hair), stored), want)
        even = torch.where(low.view(torch.int16) % 2 == 0, low, high)
        assert torch.equal(all_rounded(middle, stored), even)


def test_e4m3_rounds_to_the_nearest_of_all_its_numbers():
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # 0 .. 448
    middles = (table[1:] + table[:-1]) / 2
    values = torch.cat([table, middles, middles * (1 - 2**-20), middles * (1 + 2**-20)])
    row = torch.cat([values, -values]).float().reshape(1, 1, -1)  # 448 is in it: the scale is 1
    out, scales = torch.empty(1, row.shape[2]).to(torch.float8_e4m3fn), torch.empty(1)
    pack(row, torch.zeros(1, 2, dtype=torch.int32), out=out, scales=scales)
    assert scales.item() == 1
    distance = (row[0, 0].double().abs()[:, None] - table).abs()
    nearest = distance.min(1).values
    chosen = out[0].double()
    assert torch.equal((chosen.abs() - row[0, 0].double().abs()).abs(), nearest)
    assert torch.equal(chosen.signbit(), row[0, 0].signbit())
    ties = (distance == nearest[:, None]).sum(1) == 2
    assert ties.sum() == 2 * 126 and (out.view(torch.uint8)[0, ties] % 2 == 0).all()


@pytest.mark.parametrize("stored", list(MOST), ids=named)
def test_scales_give_the_values_back(stored: torch.dtype):
    x = torch.randn(1, 40, 300) * torch.logspace(-30, 30, 40).reshape(1, 40, 1)
    places = torch.stack([torch.zeros(40), torch.arange(40)], 1).int()
    out, scales = torch.empty(40, 300).to(stored), torch.empty(40)
    pack(x, places, out=out, scales=scales)
    most = x[0].abs().amax(1, keepdim=True)
    error = (out.float() * scales[:, None] - x[0]).abs()
    if stored == torch.int8:
        assert (error <= most / 127 * 0.501).all()
    else:
        assert (error <= x[0].abs() / 16 * 1.001 + most / 448 * 2**-10 * 1.001).all()
    assert torch.equal(scales, most[:, 0] / MOST[stored])


def test_zeros_and_values_that_are_not_finite():
    x = torch.tensor([[[0.0, -0.0, 0], [torch.nan, 2, -1], [torch.inf, 1, -2], [1, 2, 3]]])
    places = torch.tensor([[0, token] for token in range(4)]).int()
    counted = torch.tensor([10])
    out, scales = torch.empty(4, 3).to(torch.float8_e4m3fn), torch.empty(4)
    pack(x, places, out=out, scales=scales, not_finite=counted)
    assert scales[:2].tolist() == [1, np.float32(2) / np.float32(448)]
    assert out.view(torch.uint8)[:2].tolist() == [[0, 0x80, 0], [0x7F, 0x7E, 0xF6]]
    assert out.float()[2].tolist() == [448, 224, -448]
    assert counted.item() == 12
    small = torch.empty(4, 3, dtype=torch.int8)
    pack(x, places, out=small, scales=scales)
    assert small[1:3].tolist() == [[0, 127, -64], [127, 64, -127]]
    half = pack(x * 3e4, places, out=torch.empty(4, 3).half(), not_finite=counted.zero_())
    assert counted.item() == 3 and half[3].tolist() == [30000, 60000, torch.inf]


def test_max_counts_what_it_hides():
    x = torch.tensor([[[1.0], [-torch.inf], [2.0], [torch.nan], [-0.0], [0.0]]])
    places = torch.tensor([[0, token] for token in range(6)]).int()
    counted, groups = torch.tensor([0]), torch.tensor([0, 2, 4, 6]).int()
    out = pack(x, places, groups=groups, pool="max", out=torch.empty(3, 1), not_finite=counted)
    assert out[0] == 1 and out[1].isnan() and out[2] == 0 and not out[2].signbit()
    assert counted.item() == 2


@NEEDS_NATIVE
def test_results_do_not_depend_on_threads():
    for case in (Case("rows", (1, 900, 300), 800), Case("p", (1, 900, 300), 800, "mean")):
        x, places, minus, groups = case.inputs(torch.float32)
        before, found = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(case.outputs(torch.int8))
                operator(*found[-1], x, places, minus, groups, case.pool_number)
        finally:
            torch.set_num_threads(before)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_outputs_are_those_given_and_have_no_gradient():
    x = torch.ones(1, 2, 2, requires_grad=True)
    out = torch.zeros(1, 2)
    version = out._version
    assert pack(x, torch.zeros(1, 2, dtype=torch.int32), out=out) is out
    assert out.tolist() == [[1, 1]] and not out.requires_grad and out._version == version + 1


def test_opcheck():
    for pool, stored in (("none", torch.bfloat16), ("mean", torch.int8)):
        case = Case(pool, (2, 9, 20), 7, pool, minus=True)
        x, *operands = case.inputs(torch.float32)
        arguments = (*case.outputs(stored), x, *operands, case.pool_number)
        torch.library.opcheck(torch.ops.dreamreader.pack.default, arguments)


X, OUT = torch.ones(2, 3, 4), torch.empty(1, 4)
PLACES, GROUPS = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": X[0]}, r"x must be \[entries, tokens, features\] of floating point, got float32"),
        ({"x": X.long()}, r"got int64 \[2, 3, 4\]"),
        ({"places": PLACES.long()}, r"places must be int32 \[places, 2\], got int64 \[1, 2\]"),
        ({"places": PLACES + 2}, "places name entry 2, x has 2"),
        ({"places": PLACES - 1}, "places name entry -1, x has 2"),
        ({"places": torch.tensor([[1, 3]]).int()}, "places name token 3, x has 3"),
        ({"minus": X.half()}, r"minus must be float32 \[2, 3, 4\] as x is, got float16"),
        ({"pool": "sum"}, "pool must be one of none, mean, max, got 'sum'"),
        ({"pool": "max"}, r"pool 'max' needs int32 groups \[rows \+ 1\], got none"),
        ({"groups": GROUPS}, "groups go with a pool of mean or max, got pool 'none'"),
        ({"pool": "mean", "groups": GROUPS + 1}, "groups reach from 1 to 2, there are 1 places"),
        ({"pool": "mean", "groups": GROUPS * 0}, "groups must increase, row 0 has no place"),
        ({"out": torch.empty(2, 4)}, r"out must be \[1, 4\] of float32, .*int8, got float32 \[2"),
        ({"out": OUT.double()}, r"got float64 \[1, 4\]"),
        ({"out": torch.empty(1, 8)[:, ::2]}, r"out must be dense, got strides \[8, 2\]"),
        ({"out": OUT.to(torch.int8)}, r"int8 needs float32 scales \[1\], got none"),
        ({"scales": OUT[0, :1]}, "scales go with float8_e4m3fn and int8, got out of float32"),
        ({"not_finite": torch.zeros(1)}, r"not_finite must be int64 \[1\], got float32 \[1\]"),
        ({"out": torch.empty(1, 4, requires_grad=True)}, "out requires grad, and what is packed"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(change, text):
    with pytest.raises(InvalidInput, match=text):
        pack(**{"x": X, "places": PLACES, "out": OUT, **change})


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"places": PLACES + 7}, "a place is outside x"),
        ({"out": torch.empty(2, 4)}, "out must have a row for each place"),
        ({"out": torch.empty(1, 3)}, r"out must be dense \[rows, features\]"),
        ({"x": X.long()}, "got int64"),
        ({"pool": 1, "groups": GROUPS * 0}, "a group is empty"),
        ({"pool": 1, "groups": GROUPS + 1}, "a group is outside places"),
        ({"stored": 3}, "scales go with 8-bit types"),
    ],
)
def test_the_kernel_refuses_what_it_would_follow_blindly(change, text):
    names = ("out", "scales", "not_finite", "x", "places", "minus", "groups", "pool", "stored")
    given = {"out": OUT, "x": X, "places": PLACES, "pool": 0, "stored": 0, **change}
    with pytest.raises(ValueError, match=text):
        NATIVE.pack_cpu(*(given.get(name) for name in names), 1)
