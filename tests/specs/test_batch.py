"""How much memory a call takes, seen in one call."""

import pytest
import torch
from torch import nn

from dreamreader.specs.batch import activation_bytes


def test_the_estimate_counts_what_leaves_give_and_leaves_nothing_behind() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
    modules = list(net.modules())
    x = torch.zeros(5, 4)
    sizes = [5 * 8 * 4, 5 * 8 * 4, 5 * 2 * 4]
    for _ in range(2):  # hooks of the first would count again
        assert activation_bytes(net, lambda: net(x)) == 3 * max(sizes) + sum(sizes) // 2
        assert not any(each._forward_hooks for each in modules)
    with pytest.raises(RuntimeError):
        activation_bytes(net, lambda: net(torch.zeros(5, 3)))
    assert not any(each._forward_hooks for each in modules)
