"""A language model is run only as far as something is read."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiny
import torch
from torch import Tensor, nn

from dreamreader.engine import Reader
from dreamreader.harvest.early_stop import EarlyStop

from .jobs import texts


class Blocks(nn.Module):
    """Runs a list of linear blocks in an order of its own."""

    def __init__(self, order: list[int]):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in order)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for n in self.order:
            x = self.blocks[n](x)
        return x


def calls_of(module: nn.Module) -> list[int]:
    found: list[int] = []
    module.register_forward_hook(lambda *_: found.append(1))
    return found


def test_blocks_behind_the_last_site_run_once_and_rows_stay_the_same(tmp_path: Path) -> None:
    reader = Reader(*tiny.language_model("gpt2"))
    first, last = (calls_of(reader.subject.transformer.h[n]) for n in (0, -1))
    changes = {"reader": reader, "capture": [{"sites": "transformer.h.0", "dtype": "model"}]}
    whole = texts(**changes)
    whole.job._early_stop = None
    store = whole.run(tmp_path / "whole")
    assert len(first) == len(last) == 3
    found = texts(**changes).run(tmp_path / "stopped")
    assert (len(first), len(last)) == (6, 4)
    one, two = (each.read("transformer.h.0").values for each in (store, found))
    assert torch.equal(one, two) and len(one)


def test_nothing_is_ended_where_blocks_run_in_another_order() -> None:
    for order, ended in (([0, 1, 2], True), ([0, 2, 1], False), ([2, 1, 0], False)):
        model = Blocks(order)
        stop = EarlyStop(model, [model.blocks[1]])
        counts = [calls_of(each) for each in model.blocks]
        for _ in range(2):
            with stop.around_forward():
                model(torch.zeros(1, 2))
        assert stop.block is model.blocks[2]
        assert [len(each) for each in counts[1:]] == [2, 1 if ended else 2], order


def test_the_same_model_runs_on_in_other_threads() -> None:
    model = Blocks([0, 1])
    stop = EarlyStop(model, [model.blocks[0]])
    counts = [calls_of(each) for each in model.blocks]
    with ThreadPoolExecutor(1) as others:
        for _ in range(2):
            with stop.around_forward():
                others.submit(model, torch.zeros(1, 2)).result()
                model(torch.zeros(1, 2))
    assert [len(each) for each in counts] == [4, 3]


def test_there_is_no_block_behind_the_last_one_or_outside_a_list() -> None:
    model = Blocks([0, 1])
    assert EarlyStop(model, [model.blocks[1]]).block is None
    assert EarlyStop(model, [model]).block is None
    assert EarlyStop(model, [model.blocks[0], model]).block is None
    assert EarlyStop(model, []).block is None
