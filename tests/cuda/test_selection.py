"""Selections on a GPU: nothing waits, no dense activations, the same bits, guesses that fail."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor

from dreamreader.ops import batch_topk_reference, encode_select_reference
from tests.cases._matrices import VALUES, identical, matrix
from tests.ops.harness import needs_gpu, same

OPS = torch.ops.dreamreader
pytestmark = [pytest.mark.gpu, needs_gpu]


def calls(rows: int = 512, width: int = 20_000) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Every selection of matrices of several blocks."""
    g = torch.Generator("cuda").manual_seed(0)
    draw = partial(torch.randn, generator=g, device="cuda", dtype=torch.bfloat16)
    x, weight, bias = draw(rows, 64), draw(width, 64), draw(width)
    dense, one = draw(rows, width), torch.tensor(2.0, device="cuda")
    pool = torch.arange(0, width, 3, device="cuda", dtype=torch.int32)
    encode = partial(OPS.encode_select, x, weight, bias)
    return {
        "topk": lambda: OPS.topk(dense, 40),
        "batch_topk": lambda: OPS.batch_topk(dense, 40 * rows, None),
        "pool": lambda: OPS.batch_topk(dense, 4 * rows, pool),
        "threshold": lambda: OPS.threshold_select(dense, one, 2000 * rows),
        "scores": lambda: (OPS.column_scores(dense, "entropy"),),
        "encode topk": lambda: encode("topk", 40, None, None, 0),
        "encode batch_topk": lambda: encode("batch_topk", 40 * rows, None, None, 0),
        "encode threshold": lambda: encode("threshold", 0, None, one * 8, 9000 * rows),
    }


def test_nothing_waits_and_two_runs_give_the_same_bits():
    for name, call in calls().items():
        first = call()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert same(list(first), list(again)), name


def test_a_captured_graph_gives_the_same():
    for name, call in calls().items():
        wanted = call()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        graph.replay()
        assert same(list(found), list(wanted)), name


@pytest.mark.parametrize(("rule", "count"), [("topk", 32), ("batch_topk", 32 * 4096)])
def test_the_dense_activations_never_exist(rule: str, count: int):
    rows, width = 4096, 65_536
    g = torch.Generator("cuda").manual_seed(0)
    x, weight = (
        torch.randn(size, 128, generator=g, device="cuda", dtype=torch.bfloat16)
        for size in (rows, width)
    )
    OPS.encode_select(x[:64], weight, None, rule, 32, None, None, 0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    OPS.encode_select(x, weight, None, rule, count, None, None, 0)
    torch.cuda.synchronize()
    dense = rows * width * x.element_size()
    assert torch.cuda.max_memory_allocated() - before < dense / 4


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_blocks_of_hard_data(values: str, dtype: torch.dtype):
    x = matrix(values, (70, 33_000), dtype)
    for count in (7, 90_000):
        found = OPS.batch_topk(x.cuda(), count, None)
        wanted = list(batch_topk_reference(x, count, None))
        identical(None, [each.cpu() for each in found], wanted, [])


@pytest.mark.parametrize(("rank", "room"), [(1, 10**7), (10**7, 50)], ids=["too_few", "no_room"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_guess_that_fails_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, rank: int, room: int, dtype: torch.dtype
):
    for name in ("batch_topk", "encode_select"):
        module = import_module(f"dreamreader.triton_kernels.{name}")
        monkeypatch.setattr(module, "guess", lambda *sizes: (rank, room))
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randint(-3, 4, shape, generator=g).to(dtype)
        for shape in ((300, 40), (9000, 40), (9000,))
    )
    args = x, weight, bias, "batch_topk", 20_000, None, None, 0
    there = [each.cuda() if isinstance(each, Tensor) else each for each in args]
    found = OPS.encode_select(*there)
    identical(None, [each.cpu() for each in found], list(encode_select_reference(*args)), [])
    dense = torch.addmm(bias, x, weight.T)
    found = OPS.batch_topk(dense.cuda(), 20_000, None)
    wanted = batch_topk_reference(dense, 20_000, None)
    identical(None, [each.cpu() for each in found], list(wanted), [])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_more_entries_than_32_bits_can_count(count: int):
    """Windows of a short vector: the first and the last of them see one entry each."""
    rows, width = 70_000, 32_768
    memory = torch.zeros(rows + width - 1, dtype=torch.bfloat16, device="cuda")
    memory[0], memory[-1] = 5, 7
    values, _, row_ptr, columns = OPS.batch_topk(
        memory.as_strided((rows, width), (1, 1)), count, None
    )
    assert values.tolist() == ([7.0] if count == 1 else [5.0, 7.0, 0.0][:count])
    assert columns.tolist() == ([width - 1] if count == 1 else [0, width - 1, -1][:count])
    assert int(row_ptr[1]) == (count > 1) and int(row_ptr[-1]) == min(2, count)
    equal = torch.ones(width, dtype=torch.bfloat16, device="cuda").expand(rows, width)
    _, _, row_ptr, columns = OPS.batch_topk(equal, count, None)
    assert row_ptr[1:].eq(count).all() and columns.tolist() == list(range(count))
