"""Which tokens are kept: exact numbers, streams that ignore the batch, keys, and wrong inputs."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamreader import _register
from dreamreader.errors import InvalidInput
from dreamreader.ops import Chosen, choose, counts_of_budget, permuted, stream_of, streams_of
from tests.cases.choose import batch

NATIVE = _register.native()[0]
NEEDS_NATIVE = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_rows_are_the_definition():
    given = batch([50, 20])
    places, keys = choose(**given, moment=4, counts=ints(7, 30), shift=ints(100, -1))
    first, second = given["tokens"][:50], given["tokens"][50:]
    drawn = permuted(torch.arange(7), 50, int(given["streams"][0]))
    assert torch.equal(places[:7, 1], first[drawn].sort().values)
    assert torch.equal(places[7:, 1], second)
    assert places[:, 0].tolist() == given["entries"].repeat_interleave(ints(7, 20)).tolist()
    assert torch.equal(keys[:, 3] - places[:, 1], ints(*[100] * 7, *[-1] * 20))
    assert (keys[:, 1] == 4).all()
    assert keys[[0, 7], 0].tolist() == given["samples"].tolist()
    assert keys[[0, 7], 2].tolist() == given["branches"].tolist()


def test_what_is_kept_does_not_depend_on_the_batch():
    given = batch([40, 60, 80])
    together = choose(**given, moment=0, counts=ints(9, 9, 9))
    for e in range(3):
        begin, end = given["offsets"][e : e + 2].tolist()
        alone = {name: each[e : e + 1] for name, each in given.items() if len(each) == 3}
        alone |= {"tokens": given["tokens"][begin:end], "offsets": ints(0, end - begin)}
        assert torch.equal(
            choose(**alone, moment=0, counts=ints(9)).places, together.places[9 * e : 9 * e + 9]
        )


def test_every_token_is_kept_equally_often():
    samples = np.arange(4000)
    n = len(samples)
    tokens, column = torch.arange(10).int().repeat(n), torch.zeros(n, dtype=torch.int32)
    kept = choose(
        tokens,
        torch.arange(n + 1).int() * 10,
        column,
        torch.from_numpy(samples).int(),
        column,
        torch.from_numpy(streams_of(3, samples, step=7)),
        0,
        column + 3,
    ).places
    seen = torch.bincount(kept[:, 1], minlength=10).double()
    assert ((seen - 1200).abs() < 5 * np.sqrt(1200)).all()


def test_given_memory_is_filled_from_the_front():
    given = batch([30, 30])
    fresh = choose(**given, moment=1, counts=ints(4, 6))
    room = Chosen(torch.full((12, 2), -9).int(), torch.full((12, 4), -9).int())
    found = choose(**given, moment=1, counts=ints(4, 6), out=room)
    for mine, memory, want in zip(found, room, fresh, strict=True):
        assert mine.data_ptr() == memory.data_ptr() and torch.equal(mine, want)
        assert (memory[10:] == -9).all()
    exact = Chosen(room.places[:10], room.keys[:10])
    assert choose(**given, moment=1, counts=ints(4, 6), out=exact) is exact


def test_streams_never_change():
    """Stored jobs depend on these numbers."""
    assert stream_of(0, 0) == 5149329804689171383
    assert stream_of(1, 2, 3, 4, "cond") == 8899423595148952036


def test_streams_differ_in_every_part():
    samples = np.arange(1000)
    together = streams_of(5, samples, 2, 1, "cond")
    assert together.dtype == np.int64 and together.min() >= 0
    assert together[[0, 999]].tolist() == [stream_of(5, n, 2, 1, "cond") for n in (0, 999)]
    others = [(6, 2, 1, "cond"), (5, 3, 1, "cond"), (5, 2, 2, "cond"), (5, 2, 1, "uncond")]
    others += [(5, 1, 2, "cond"), (5, -1, -1, "")]
    streams = [together, *(streams_of(seed, samples, *rest) for seed, *rest in others)]
    assert len(np.unique(np.stack(streams))) == 7000


@pytest.mark.parametrize("backend", [pytest.param("native", marks=NEEDS_NATIVE), "reference"])
@pytest.mark.parametrize(("budget", "calls"), [(5, 3), (100, 7), (3, 20), (0, 4), (8, 1), (40, 40)])
def test_a_budget_is_spent_exactly(
    budget: int, calls: int, backend: str, monkeypatch: pytest.MonkeyPatch
):
    if backend == "reference":
        monkeypatch.setattr(sys.modules[choose.__module__], "_native", None)
    streams = torch.from_numpy(streams_of(0, np.arange(50)))
    each = torch.stack([counts_of_budget(budget, calls, call, streams) for call in range(calls)])
    assert each.dtype == torch.int32 and (each.sum(0) == budget).all()
    assert set(each.unique().tolist()) <= {budget // calls, budget // calls + 1}
    for call in range(calls):
        extra = [
            int(permuted(np.array([call]), calls, int(s))[0]) < budget % calls for s in streams
        ]
        assert each[call].tolist() == [budget // calls + more for more in extra]


def test_the_rest_of_a_budget_goes_to_every_call_equally_often():
    streams = torch.from_numpy(streams_of(0, np.arange(6000)))
    extra = [int(counts_of_budget(13, 6, call, streams).sum()) - 12_000 for call in range(6)]
    assert sum(extra) == 6000 and all(abs(each - 1000) < 5 * np.sqrt(1000) for each in extra)


@NEEDS_NATIVE
def test_without_the_native_module_budgets_and_rows_are_the_same(monkeypatch: pytest.MonkeyPatch):
    module = sys.modules[choose.__module__]
    given, streams = batch([70, 10]), torch.tensor([3, 2**63 - 1, -4])
    native = [choose(**given, moment=2, counts=ints(9, 9)), counts_of_budget(7, 5, 2, streams)]
    monkeypatch.setattr(module, "_native", None)
    numpy = [choose(**given, moment=2, counts=ints(9, 9)), counts_of_budget(7, 5, 2, streams)]
    assert all(torch.equal(a, b) for a, b in zip(native[0], numpy[0], strict=True))
    assert torch.equal(native[1], numpy[1])
    with pytest.raises(InvalidInput, match="out has room for 3 rows, 18 are kept"):
        choose(**given, moment=2, counts=ints(9, 9), out=room_for(3))


def room_for(rows: int) -> Chosen:
    return Chosen(torch.empty(rows, 2).int(), torch.empty(rows, 4).int())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tokens": torch.arange(6)}, r"tokens must be dense int32 \[6\] on the CPU, got int64"),
        ({"tokens": ints(0, 1, 1, 0, 1, 2)}, "the candidates of entry 0 do not ascend at 1"),
        ({"tokens": ints(0, 1, 2, 0, 3, 2)}, "the candidates of entry 1 do not ascend at 2"),
        ({"offsets": ints(0, 3)}, r"offsets must be dense int32 \[3\] on the CPU, got int32 \[2\]"),
        ({"offsets": ints(0, 3, 5)}, r"offsets must ascend from 0 to 6, got \[0, 3, 5\]"),
        ({"offsets": ints(0, 7, 6)}, r"offsets must ascend from 0 to 6, got \[0, 7, 6\]"),
        ({"samples": ints(1)}, r"samples must be dense int32 \[2\] on the CPU, got int32 \[1\]"),
        ({"branches": ints(1, 2, 3, 4)[::2]}, r"branches must be dense .* with strides \[2\]"),
        ({"streams": ints(1, 2)}, r"streams must be dense int64 \[2\] on the CPU, got int32 \[2\]"),
        ({"counts": ints(1)}, r"counts must be dense int32 \[2\]"),
        ({"counts": ints(1, -1)}, "counts must be 0 or more, got -1"),
        ({"shift": ints(1)}, r"shift must be dense int32 \[2\]"),
        ({"out": room_for(5)}, "out has room for 5 rows, 6 are kept"),
        ({"out": Chosen(*room_for(9)[::-1])}, r"out.places must be dense int32 \[9, 2\]"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(change, text):
    with pytest.raises(InvalidInput, match=text):
        choose(**{**batch([3, 3]), "tokens": ints(0, 1, 2, 0, 1, 2), "moment": 0, **change})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((5, 3, 3), "got budget 5, calls 3, call 3"),
        ((5, 0, 0), "got budget 5, calls 0, call 0"),
        ((-1, 2, 0), "got budget -1, calls 2, call 0"),
        ((2**40, 2, 0), "got budget 1099511627776, calls 2"),
    ],
)
def test_wrong_budgets_say_what_is_wrong(arguments, text):
    with pytest.raises(InvalidInput, match=text):
        counts_of_budget(*arguments, torch.zeros(2, dtype=torch.int64))


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"offsets": ints(0, 3, 7)}, "offsets reach beyond tokens"),
        ({"offsets": ints(0, 4, 3)}, "offsets must ascend"),
        ({"counts": ints(1, -1)}, "counts be 0 or more"),
        ({"keys": torch.empty(8, 4).int()}, r"keys must be int32 \[rows, 4\]"),
    ],
)
def test_the_kernel_refuses_what_it_would_follow_blindly(change, text):
    names = ("counts", "shift", "moment", "places", "keys")
    given = {**batch([3, 3]), "moment": 0, "places": room_for(9)[0], "keys": room_for(9)[1]}
    given |= change
    operands = [given[name] for name in batch([3])] + [given.get(name) for name in names]
    with pytest.raises(ValueError, match=text):
        NATIVE.choose_cpu(*operands)
