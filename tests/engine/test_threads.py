"""Whose calls a session sees."""

import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from dreamreader.edits import Ablate, Steer
from dreamreader.engine import Reader

NET = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
X = torch.randn(4, 3)


def test_replicas_that_torch_starts_belong_to_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas run in workers of `parallel_apply`, which takes the CPU for an accelerator here."""
    module = sys.modules["torch.nn.parallel.parallel_apply"]
    monkeypatch.setattr(module, "_get_device_index", lambda *_: 0)
    for name, value in {
        "current_stream": lambda *_: nullcontext(),
        "device_index": lambda *_: nullcontext(),
        "is_available": lambda: True,
        "current_accelerator": lambda: torch.device("cpu"),
    }.items():
        monkeypatch.setattr(torch.accelerator, name, value)
    with torch.no_grad():
        plain = NET(X)
        with Reader(NET).editing(Steer("1", torch.ones(3), alpha=1.0)):
            alone = NET(X)
            replicas = module.parallel_apply([NET, NET], [(X,), (X,)])
            foreign: list[torch.Tensor] = []
            thread = threading.Thread(target=lambda: foreign.append(NET(X).detach()))
            thread.start()
            thread.join()
    assert all(torch.equal(each, alone) for each in replicas) and not torch.equal(alone, plain)
    assert torch.equal(foreign[0], plain)


def test_recomputation_in_the_backward_pass_belongs_to_the_session() -> None:
    from torch.utils.checkpoint import checkpoint

    push = torch.ones(3, requires_grad=True)
    grads = []
    for checkpointed in (False, True):
        push.grad = None
        with Reader(NET).editing(Steer("0", push, alpha=2.0)):
            x = X.clone().requires_grad_()
            y = checkpoint(NET, x, use_reentrant=False) if checkpointed else NET(x)
            y.square().sum().backward()
        grads.append(push.grad.clone())
    assert torch.equal(*grads) and bool(grads[0].any())


def test_what_is_learned_is_read_anew_in_every_call() -> None:
    direction = torch.ones(3, requires_grad=True)
    with Reader(NET).editing(Ablate("1", "project", direction=direction)):
        with torch.no_grad():
            NET(X)
        for _ in range(2):
            direction.grad = None
            y = NET(X)
            y.sum().backward()
            unit = (direction / direction.norm()).detach()
            torch.testing.assert_close(y @ unit, torch.zeros(4))
            assert direction.grad is not None and bool(direction.grad.any())
            with torch.no_grad():
                direction -= torch.tensor([0.5, 0.0, -0.5])


def test_recordings_of_two_threads_do_not_mix() -> None:
    results: dict[int, torch.Tensor] = {}
    start = threading.Barrier(2)

    def run(number: int) -> None:
        x = torch.full((1, 3), float(number))
        start.wait()
        with torch.no_grad(), Reader(NET).recording("1") as cache:
            for _ in range(20):
                NET(x)
        results[number] = cache["1"].tensor[:, 0, 0]

    threads = [threading.Thread(target=run, args=(n,)) for n in (1, 2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for number in (1, 2):
        with torch.no_grad():
            expected = NET(torch.full((1, 3), float(number)))
        assert torch.equal(results[number], expected.expand(20, -1))
