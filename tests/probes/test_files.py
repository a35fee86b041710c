"""Probes in files, and their cards."""

import json
from pathlib import Path

import pytest
import torch
from probes.made import activation, blobs
from safetensors.torch import load_file, save_file

from dreamreader.errors import InvalidInput
from dreamreader.probes import Card, Probe, fit


@pytest.mark.parametrize("per_step", ["each", "shared", "noise"])
@pytest.mark.parametrize("hidden", [(), (5, 4)], ids=str)
def test_a_saved_probe_loads_back_equal(tmp_path: Path, per_step: str, hidden: tuple[int, ...]):
    x, y = blobs(rows=60)
    found = activation(x[:, None, None].repeat(1, 3, 2, 1))
    probe = fit(
        found, {"color": y, "odd": y % 2}, hidden=hidden, activation="silu", per_step=per_step,
        pool="token", epochs=2, subject="tiny",
    )  # fmt: skip
    path = tmp_path / "new" / "color.safetensors"
    probe.save(path)
    again = Probe.load(path)
    assert again == probe and again.card == probe.card and again.card.controls
    assert torch.equal(again.logits(found), probe.logits(found))
    assert load_file(path)["weight.0"].shape[0] == (3 if per_step == "each" else 1)
    other = fit(found, {"color": y, "odd": y % 2}, per_step=per_step, epochs=2, controls=False)
    assert other != probe


def test_files_that_are_none_say_so(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(InvalidInput, match="x.safetensors holds no probe of dreamreader"):
        Probe.load(path)


def test_a_card_tells_what_was_trained_on_what():
    x, y = blobs(rows=60)
    prompts = [f"prompt {n // 2}" for n in range(60)]
    names = ["abc"[each] for each in y]
    found = activation(x[:, None, None].repeat(1, 2, 1, 1), prompts)
    card = fit(found, names, hidden=(8,), epochs=3, seed=7, subject="tiny").card
    assert json.loads(json.dumps(card.as_dict())) == card.as_dict()
    assert Card.of(json.loads(json.dumps(card.as_dict()))) == card
    assert card.rows == {"train": 36, "validation": 12, "held_out": 12}
    assert card.groups == {"train": 18, "validation": 6, "held_out": 6}
    assert sum(card.counts.values()) == 36 and list(card.counts) == ["a", "b", "c"]
    assert card.steps == [0, 1] and card.branch == "cond" and card.subject == "tiny"
    assert card.training["seed"] == 7 and card.training["hidden"] == [8]
    own = card.held_out[""]
    assert sum(map(sum, own["confusion"])) == 24 and list(own["recall"]) == ["a", "b", "c"]
    hits = sum(own["confusion"][n][n] for n in range(3))
    assert own["accuracy"]["value"] == pytest.approx(hits / 24) and own["accuracy"]["n"] == 6
    assert set(card.controls) == {"shuffled_labels", "random_feature", "capacity_sweep"}
    text = card.markdown()
    assert (
        "- subject: tiny" in text and "| - | random feature |" in text and "| - | linear |" in text
    )


def test_a_card_is_a_part_of_a_report():
    from dreamreader.report.page import Report

    x, y = blobs(rows=60)
    section = fit(x, ["<b>a", "b", "c"] * 20, epochs=2).card.section()
    page = Report("Probes", sections=[section]).html()
    assert "shuffled labels" in page and "&lt;b&gt;a 12" in page
