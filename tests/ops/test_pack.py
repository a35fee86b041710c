"""Properties of the packing of rows: its formats, and what must be refused."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamreader import _register
from dreamreader.errors import InvalidInput
from dreamreader.ops import pack, pack_reference
from dreamreader.ops.pack import MOST, POOLS
from tests.ops.harness import named

NATIVE = _register.native()[0]
NEEDS_NATIVE = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")


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


def test_outputs_are_those_given_and_have_no_gradient():
    x = torch.ones(1, 2, 2, requires_grad=True)
    out = torch.zeros(1, 2)
    version = out._version
    assert pack(x, torch.zeros(1, 2, dtype=torch.int32), out=out) is out
    assert out.tolist() == [[1, 1]] and not out.requires_grad and out._version == version + 1


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


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("values", [[-0.0, -0.0], [-0.0, 0.0], [-0.0], [-1e-45, 0.0]], ids=str)
def test_the_sign_of_zero_is_that_of_the_reference(pool: str, values: list[float]):
    x = torch.tensor(values).reshape(1, -1, 1).expand(-1, -1, 40).contiguous()
    places = torch.tensor([[0, n] for n in range(len(values))], dtype=torch.int32)
    groups = torch.tensor([0, len(values)], dtype=torch.int32)
    one, other = torch.empty(1, 40), torch.empty(1, 40)
    pack(x, places, groups=groups, pool=pool, out=one)
    pack_reference(other, None, None, x, places, None, groups, POOLS.index(pool))
    assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_compiles_without_graph_breaks():
    x, places = torch.randn(1, 4, 3), torch.tensor([[0, 3], [0, 1]], dtype=torch.int32)

    def packed(x: torch.Tensor) -> torch.Tensor:
        return pack(x, places, out=torch.empty(2, 3)) + 1

    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), packed(x))
