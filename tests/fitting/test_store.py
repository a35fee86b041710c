"""Autoencoders from a store: several in one pass, buffers, constraints, exact resume."""

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting.toy import RECIPES, SITE, error, normalise, saes, trained, write_store
from torch import nn
from torch.utils.data import DataLoader

from dreamreader.errors import InvalidInput
from dreamreader.fitting import fit
from dreamreader.store import StoreDataset

KILLED = Path(__file__).with_name("killed.py")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "rows")


def check_equal(one: Mapping[str, nn.Module], other: Mapping[str, nn.Module]) -> None:
    assert list(one) == list(other)
    for name, sae in one.items():
        wanted = other[name].state_dict()
        assert {"idle", "threshold", "decoder"} <= set(wanted)
        for key, value in sae.state_dict().items():
            assert torch.equal(value, wanted[key]), f"{name}.{key}"


def test_killed_inside_an_epoch_it_ends_equal_to_the_bit(store: Path, tmp_path: Path):
    done = subprocess.run([sys.executable, KILLED, store, tmp_path, "15"], check=False)
    assert done.returncode == -9
    steps: list[int] = []
    again, histories = trained(store, tmp_path, progress=lambda event: steps.append(event.done))
    assert steps[0] == 13 and steps[-1] == 30  # the last state was that of step 12, in epoch 1
    whole, wanted = trained(store)
    check_equal(again, whole)
    assert histories == wanted
    assert whole["small"].idle.max() > 0 and bool(whole["small"].threshold.isfinite())


@pytest.mark.parametrize("at", [10, 20, 30], ids=["one epoch", "two", "all"])
def test_stopped_at_the_end_of_an_epoch_it_goes_on_with_the_next(
    store: Path, tmp_path: Path, at: int
):
    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if event.done == at:
            raise Stop

    with pytest.raises(Stop):
        trained(store, tmp_path, progress=stop, save_every=10)
    check_equal(trained(store, tmp_path, save_every=10)[0], trained(store)[0])


def test_in_one_pass_each_is_what_it_is_alone(store: Path):
    both, histories = trained(store)
    for name in RECIPES:
        alone, history = trained(store, names=(name,))
        check_equal({name: both[name]}, alone)
        assert history[name] == histories[name]


def test_a_loader_of_the_store_gives_every_epoch_its_order(store: Path):
    saes_alone, _ = trained(store, names=("small",))
    sae = saes()["small"]
    loader = DataLoader(StoreDataset(store, SITE, batch_size=29, seed=4), batch_size=None)
    fit(sae, error, loader, RECIPES["small"], after_step=normalise)
    check_equal(saes_alone, {"small": sae})


def falling(step: int) -> float:
    return min(1, (step + 1) / 3) * min(1, (30 - step) / 7.5)


def cosine(step: int) -> float:
    return (1 + math.cos(math.pi * step / 30)) / 2


@pytest.mark.parametrize(
    ("name", "optimizer", "lr", "share", "clip"),
    [
        ("small", torch.optim.Adam, 0.02, falling, math.inf),
        ("large", lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0), 0.01, cosine, 0.05),
    ],
    ids=["small", "large"],
)
def test_it_is_the_loop_that_one_would_write(
    store: Path, name: str, optimizer: Any, lr: float, share: Any, clip: float
):
    found, histories = trained(store, names=(name,))
    sae = saes()[name]
    optimizer = optimizer(sae.parameters(), lr=lr)
    rows, losses = StoreDataset(store, SITE, batch_size=29, seed=4), []
    for epoch in range(3):
        rows.set_epoch(epoch)
        for x in rows:
            step = len(losses)
            optimizer.param_groups[0]["lr"] = lr * share(step)
            loss = error(sae, x)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.cat([p.grad.flatten() for p in sae.parameters() if p.grad is not None])
            if float(norm.norm()) > clip:
                nn.utils.clip_grad_norm_(sae.parameters(), clip)
            optimizer.step()
            normalise(sae, step + 1)
            losses.append(float(loss.detach()))
    check_equal(found, {name: sae})
    assert histories[name].losses == losses and sum(losses[20:]) < sum(losses[:10])
    assert torch.allclose(sae.decoder.norm(dim=1), torch.ones(len(sae.decoder)))


def test_a_folder_goes_on_with_its_own_rows_only(store: Path, tmp_path: Path):
    trained(store, tmp_path / "run", names=("small",))

    def go_on(sae: nn.Module, **changes) -> None:
        options = {"batch_size": 29, "seed": 4} | changes
        rows = StoreDataset(store, SITE, **options)
        fit({"small": sae}, error, rows, RECIPES["small"], tmp_path / "run", after_step=normalise)

    for changes, text in (({"seed": 5}, "'seed': 4.*'seed': 5"), ({"batch_size": 20}, "batches")):
        with pytest.raises(InvalidInput, match=f"holds a training with .*{text}.*another folder"):
            go_on(saes()["small"], **changes)
    with pytest.raises(InvalidInput, match=r"small: parameter encoder='\[16, 12\] torch.float32'"):
        go_on(saes()["large"])
    go_on(saes()["small"])
