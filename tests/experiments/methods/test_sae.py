"""Latents in experiments are changed as `SAEEdit` changes them."""

from pathlib import Path

import pytest
import torch

import dreamreader as dr
from dreamreader.errors import InvalidInput
from dreamreader.sae import SAEEdit, SparseAutoencoder, TopK

from ..conftest import PAIRS
from .test_patch import SITES, STEPS, Blueness, blueness

SITE = SITES[0]


@pytest.fixture
def file(reader, tmp_path: Path) -> str:
    found = reader.run(PAIRS[0]["source"], record=SITE, seeds=[5], **STEPS)
    width = found.cache[SITE].shape[-1]
    sae = SparseAutoencoder(width, 24, TopK(3), seed=2)
    sae.statistics["frequency"] = torch.linspace(0.01, 0.5, 24)
    sae.save(tmp_path / "sae.safetensors")
    return str(tmp_path / "sae.safetensors")


def method(file: str, **changes) -> dict:
    own = {"kind": "sae", "autoencoder": {"file": file}, "sites": SITE, "features": [3, 7]}
    return own | {"strengths": [2.0, 6.0], "branch": "cond"} | changes


def test_rows_are_those_of_edits_by_hand(experiment, reader, tmp_path, file) -> None:
    results = experiment(
        metrics=[Blueness()],
        data={"prompts": [PAIRS[0]["source"]]},
        seeds=[5],
        method=method(file),
        batch={"rows": 5},
    ).run(tmp_path / "run")
    sae = SparseAutoencoder.load(file)
    for row in results.of("edited"):
        edit = SAEEdit(SITE, sae, int(row["features"]), "set", row["strength"], branch="cond")
        want = blueness(reader.run(PAIRS[0]["source"], edits=edit, seeds=[5], **STEPS))
        assert row["blueness"] == pytest.approx(float(want[0]), abs=1e-4)
    assert len(results.of("edited")) == len(results.of("random_features")) == 4
    values = [row["blueness"] for row in results.rows]
    assert len(set(values)) > 4  # settings differ


def test_random_latents_have_about_the_same_frequency(experiment, tmp_path, file) -> None:
    made = experiment(method=method(file, features={"pair": [3, 4]}))
    own = made.spec.method.random_sets()
    assert set(own) == {"pair"} and len(own["pair"]) == 2 and not {3, 4} & set(own["pair"])
    assert all(abs(each - 3.5) < 20 for each in own["pair"])
    assert made.spec.method.random_sets() == own


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(features=[99]), "latent 99 of 99 is none of 24"),
        (dict(autoencoder={"file": "nothing.safetensors"}), "method.autoencoder: .*nothing"),
    ],
)
def test_what_cannot_be_run_is_refused(experiment, tmp_path, file, changes, text) -> None:
    with pytest.raises(InvalidInput, match=text):
        experiment(method=method(file, **changes)).run(tmp_path / "run")


def test_without_frequencies_there_is_no_random_control(experiment, tmp_path, file) -> None:
    sae = SparseAutoencoder.load(file)
    sae.statistics.clear()
    sae.save(file)
    with pytest.raises(InvalidInput, match="does not say how often its latents are active"):
        experiment(method=method(file)).run(tmp_path / "run")
    with pytest.raises(InvalidInput, match=r"features.none: is empty"):
        experiment(method=method(file, features={"none": []}))
    assert dr.load_artifact(file).d_sae == 24


def test_a_value_of_zero_switches_off(experiment, reader, tmp_path, file) -> None:
    results = experiment(
        metrics=[Blueness()],
        data={"prompts": [PAIRS[0]["source"]]},
        seeds=[5],
        method=method(file, op="scale", strengths=[0.0], features={"all": list(range(24))})
        | {"controls": []},
        batch={"rows": 2},
    ).run(tmp_path / "run")
    edit = SAEEdit(SITE, SparseAutoencoder.load(file), range(24), "scale", 0.0, branch="cond")
    want = blueness(reader.run(PAIRS[0]["source"], edits=edit, seeds=[5], **STEPS))
    (row,), (plain,) = results.of("edited"), results.of("unedited")
    assert row["blueness"] == pytest.approx(float(want[0]), abs=1e-4)
    assert abs(row["blueness"] - plain["blueness"]) > 1e-4
