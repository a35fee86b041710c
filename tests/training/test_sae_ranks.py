"""Autoencoders trained by several processes: what they learn, who writes, how they stop."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.sae import BatchTopK, SparseAutoencoder
from dreamreader.sae.synthetic import SyntheticConfig, SyntheticFeatures
from dreamreader.training import SaeJob
from dreamreader.training.sae_ranks import check_pools, check_shares

WORLD = {"features": 24, "d_in": 12, "roots": 3, "depth": 1, "min_probability": 0.05}
SPEC: dict[str, Any] = {
    "name": "ranks",
    "known_answers": WORLD,
    "autoencoders": [
        {"selection": "TopK", "d_sae": 20, "k": 2},
        {"d_sae": 20, "k": 2, "threshold_rule": "saelens"},
    ],
    "training": {"tokens": 640, "batch_size": 64, "lr": 0.01, "save_every": 1},
    "evaluation": {"rows": 200, "curve": [128, 512]},
    "controls": [],
}
TOPK, BATCH = "TopK d=20 k=2, seed 0", "BatchTopK d=20 k=2 threshold_rule=saelens, seed 0"


def start(folder: Path, rank: int, world: int, port: int, stop: int) -> subprocess.Popen[str]:
    own = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.ranked", json.dumps(SPEC), str(folder)]
    return subprocess.Popen(
        [*command, str(stop)],
        env={**os.environ, **own, **place},
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, world: int, stop: int = -1) -> list[int]:
    """Exit codes of the processes of a training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(folder, rank, world, port, stop) for rank in range(world)]
    said = [each.communicate(timeout=240)[1] for each in processes]
    codes = [each.returncode for each in processes]
    assert stop >= 0 or codes == [0] * world, said
    return codes


def load(folder: Path) -> dict[str, SparseAutoencoder]:
    return SaeJob(SPEC).result(SaeJob.folder_type(folder))["known answers"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """What two processes made."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    assert run(folder, 2) == [0, 0]
    return folder


def test_two_processes_learn_what_one_does(pair: Path, tmp_path: Path) -> None:
    SaeJob(SPEC).run(tmp_path / "one", progress=False)
    one, two = load(tmp_path / "one"), load(pair)
    start = SparseAutoencoder(12, 20, BatchTopK(2)).W_dec
    assert not torch.allclose(one[TOPK].W_dec, start, atol=1e-2)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        a, b = getattr(one[TOPK], name), getattr(two[TOPK], name)
        assert torch.allclose(a, b, atol=2e-5), name
    assert torch.equal(one[TOPK].tokens_since_fired, two[TOPK].tokens_since_fired)
    assert int(two[TOPK].steps) == 10


def test_a_batch_top_k_is_over_the_rows_of_its_process(pair: Path) -> None:
    """One process that selects in both halves of each batch, by hand."""
    found = load(pair)[BATCH]
    rows = SyntheticFeatures(SyntheticConfig(**WORLD)).batches(64, 0)
    sae = SparseAutoencoder(12, 20, BatchTopK(2), threshold_rule="saelens", seed=0).train()
    sae.center_on(rows.draw(0))
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.01)
    job = SaeJob(SPEC)
    from dreamreader.sae.train import _recipe

    recipe = _recipe(sae, 10, None, 0.01, None, False, {})
    for step in range(10):
        halves = rows.draw(step).chunk(2)
        results = [sae.loss(each) for each in halves]
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(0.01, step, 10)
        optimiser.zero_grad()
        (sum(each.total for each in results) / 2).backward()
        sae.before_step()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        threshold = sae.threshold_mean.clone()
        sae.after_step(results[0])
        smallest = torch.stack([each.smallest for each in results]).double().mean()
        sae.threshold_mean.copy_(0.99 * threshold + 0.01 * smallest)
    assert torch.allclose(found.W_dec, sae.W_dec, atol=2e-5)
    assert torch.allclose(found.threshold_mean, sae.threshold_mean, atol=1e-6)
    whole = SparseAutoencoder(12, 20, BatchTopK(2), seed=0).train()
    counts = [whole.encode_sparse(each).count() for each in rows.draw(0).chunk(2)]
    assert [int(each) for each in counts] == [64, 64] and job.spec.training.batch_size == 64


def test_rank_0_alone_writes(pair: Path) -> None:
    assert (pair / "report.html").is_file()
    seen = sorted(each.name for each in pair.parent.iterdir() if each.name != "run")
    assert seen == ["run-seen-0", "run-seen-1"]  # both give the result
    assert (pair.parent / seen[0]).read_text() == (pair.parent / seen[1]).read_text()
    assert not (pair / "checkpoint").exists()


def test_a_killed_training_goes_on_to_the_same_bits(pair: Path, tmp_path: Path) -> None:
    codes = run(tmp_path / "run", 2, stop=6)
    assert codes[0] == 7 and codes[1] != 0  # the other ends too
    assert not (tmp_path / "run" / "report.html").exists()
    assert run(tmp_path / "run", 2) == [0, 0]
    again, first = load(tmp_path / "run"), load(pair)
    for name in (TOPK, BATCH):
        assert torch.equal(again[name].W_dec, first[name].W_dec)
        assert torch.equal(again[name].thresholds, first[name].thresholds)


def test_batches_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(InvalidInput, match="64 rows cannot be shared evenly by 3 .* 63 or 66"):
        check_shares(64, 3)
    with pytest.raises(InvalidInput, match="2 rows cannot be shared evenly by 4 .*take 4"):
        check_shares(2, 4)
    check_shares(64, 2)


def test_pools_for_several_steps_are_refused() -> None:
    check_pools([None, 1])
    with pytest.raises(InvalidInput, match=r"update_every: .* train in one process"):
        check_pools([None, 7])


def test_the_number_of_processes_is_part_of_a_training(pair: Path) -> None:
    notes = json.loads((pair / "fingerprint.json").read_text())
    assert notes["settings"]["processes"] == 2
