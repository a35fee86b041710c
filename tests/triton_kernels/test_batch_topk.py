"""The Triton kernels of candidates: guesses that fail, the order of the list, and compiled."""

import re
import sys
from typing import Any

import pytest
import torch

from dreamreader.ops import batch_topk, batch_topk_reference
from tests.cases._matrices import identical, matrix
from tests.triton_kernels.harness import WIDE, compiled, interpreted
from tests.triton_kernels.selection import by_type, compile_selection, registered, small_blocks

SCHEMA = "(Tensor x, int count, Tensor? pool) -> (Tensor, Tensor, Tensor, Tensor)"


def run(x: torch.Tensor, count: int, pool: torch.Tensor | None = None) -> None:
    """Raises AssertionError unless the kernels give what the definition gives."""
    found = sys.modules["dreamreader.ops.batch_topk"]._triton(x, count, pool)
    identical(None, list(found), list(batch_topk_reference(x, count, pool)), [])


@interpreted
@pytest.mark.parametrize("values", ["normal", "giant_row", "half_ties", "equal", "nan"])
def test_interpreter_gives_the_same_for_many_blocks_and_parts(
    monkeypatch: pytest.MonkeyPatch, values: str
):
    small_blocks(monkeypatch)
    run(matrix(values, (3, 150), torch.bfloat16), 60)
    run(matrix(values, (3, 150), torch.float32), 60, torch.arange(0, 150, 2, dtype=torch.int32))


@interpreted
@pytest.mark.parametrize(
    ("rank", "room"), [(1, 450), (450, 20), (1, 1)], ids=["too_few", "no_room", "both"]
)
def test_interpreter_reads_again_where_a_guess_fails(
    monkeypatch: pytest.MonkeyPatch, rank: int, room: int
):
    from dreamreader.triton_kernels import batch_topk as module

    small_blocks(monkeypatch)
    monkeypatch.setattr(module, "guess", lambda *sizes: (rank, room))
    run(matrix("half_ties", (3, 150), torch.float32), 60)
    run(matrix("sparse", (3, 150), torch.bfloat16), 60)  # fewer than asked for


@interpreted
def test_the_order_of_the_list_does_not_show(monkeypatch: pytest.MonkeyPatch):
    """As if the program instances had run in another order."""
    from dreamreader.triton_kernels import _candidates as module

    small_blocks(monkeypatch)
    append = module.Candidates.append

    def reversed_append(self: Any, *args: Any) -> None:
        append(self, *args)
        at, places, counts = 0, self.place.flatten(), self.many.flatten().tolist()
        lists = [each.clone() for each in (self.order, self.column)]
        assert sum(counts) <= self.room and sum(map(bool, counts)) > 2
        for tile in range(len(counts) - 1, -1, -1):
            place, many = int(places[tile]), counts[tile]
            for old, new in zip(lists, (self.order, self.column), strict=True):
                new[at : at + many] = old[place : place + many]
            self.place.view(-1)[tile], at = at, at + many

    monkeypatch.setattr(module.Candidates, "append", reversed_append)
    run(matrix("half_ties", (3, 150), torch.bfloat16), 60)


@interpreted
def test_gradients_of_the_interpreter():
    call = registered(sys.modules["dreamreader.ops.batch_topk"], SCHEMA)
    x = matrix("half_ties", (3, 40), torch.float32).requires_grad_()
    factor = torch.arange(30.0)
    (found,) = torch.autograd.grad((call(x, 30, None)[0] * factor).sum(), x)
    (wanted,) = torch.autograd.grad((batch_topk(x, 30).values * factor).sum(), x)
    assert torch.equal(found, wanted)


def test_a_guess_keeps_its_distance():
    pytest.importorskip("triton")
    from dreamreader.triton_kernels._candidates import SAMPLE, guess

    assert guess(70, SAMPLE, 1.1) == (70, SAMPLE)
    for wanted, size in ((262_144, 1 << 28), (5, 1 << 26), (1 << 20, 1 << 22)):
        rank, room = guess(wanted, size, 1.1)
        assert rank >= 1.1 * wanted * SAMPLE / size + 1
        assert min(size, 1.2 * wanted) <= room <= size
    assert guess(100, 1 << 20, 1.1, 1000)[0] < guess(100, 1 << 20, 1.1)[0]


@compiled
@by_type
def test_compiles_within_limits(dtype: str, arch: int):
    from dreamreader.triton_kernels import _candidates as module
    from dreamreader.triton_kernels._selection import BLOCK, warps_of

    warps, digits = warps_of(BLOCK), 2 if dtype == "bf16" else 4
    passes = {"AGAIN": True, "POOL": False, "BLOCK": BLOCK, "LIST": module.LIST}

    def ptx(name: str, warps: int, **constants: Any) -> str:
        return compile_selection(getattr(module, name), dtype, arch, warps, {}, **constants)

    ptx("guess_kernel", 16, POOL=True, DIGITS=digits, SAMPLE=module.SAMPLE)
    assert re.search(WIDE, ptx("append_kernel", warps, POOL=False, EACH=False, BLOCK=BLOCK))
    ptx("append_kernel", warps, POOL=True, EACH=False, BLOCK=BLOCK)
    ptx("bound_kernel", 4, DIGITS=digits)
    for digit in range(digits):
        ptx("digit_kernel", warps, DIGIT=digit, **passes)
    for name in ("tally_kernel", "write_kernel"):
        ptx(name, warps, ALL=False, **passes)
        ptx(name, 4, ALL=False, **passes | {"AGAIN": False})
        ptx(name, warps, ALL=False, **passes | {"POOL": True})
