"""Probes from specs: rows of prompts and of stores, labels of columns and of pictures."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamreader._progress import ProgressEvent
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.harvest import Harvest
from dreamreader.probes import Probe, fit
from dreamreader.probes.split import TRAIN
from dreamreader.store.merge import merge
from dreamreader.training import ProbeJob
from dreamreader.training.labels import complete_rows
from dreamreader.training.stored import SplitRows

from .jobs import DOWN, MIDDLE, PROBES


def notes(folder: Path, site: str = DOWN) -> dict[str, Any]:
    return json.loads((folder / "probes" / f"{site}.json").read_text())


def accuracy(probe: Probe, attribute: str = "") -> float:
    return probe.card.held_out[attribute]["accuracy"]["value"]


def test_a_colour_is_read_and_the_folder_says_how_well(probes, reader, tmp_path: Path):
    events: list[ProgressEvent] = []
    job = probes({"controls": True})
    found = job.run(tmp_path, progress=events.append)
    probe = found[DOWN]
    assert list(found) == [DOWN] and probe.labels == ("blue", "green", "red")
    assert accuracy(probe) > 0.8 and probe.steps == (0, 1) and probe.branch == "cond"
    assert probe.card.subject == "shapes-unet" and probe.card.groups["held_out"] == 6
    assert (tmp_path / "probes" / f"{DOWN}.safetensors").is_file()
    assert Probe.load(tmp_path / "probes" / f"{DOWN}.safetensors") == probe
    kept = notes(tmp_path)
    assert kept["card"] == probe.card.as_dict() and kept["rows"] == {"all": 18, "labelled": 18}
    assert events[0].stage == "recording" and events[-1] == ProgressEvent("probes", 1, 1)
    page = (tmp_path / "report.html").read_text()
    for part in ("right, by confidence", "told, by truth", "accuracy by step", "shuffled labels"):
        assert part in page
    record = reader.run(
        ["a small red heart", "a large green heart"],
        record=[DOWN],
        seeds=9,
        num_inference_steps=2,
        output_type="latent",
    ).cache.select(branch="cond")
    assert [each[1] for each in probe.predict(record)] == ["red", "green"]


def test_reliability_counts_the_held_out_rows(probes, tmp_path: Path):
    probe = probes().run(tmp_path)[DOWN]
    bins = notes(tmp_path)["reliability"][""]
    rows = probe.card.rows["held_out"] * len(probe.steps)
    assert sum(n for *_, n in bins) == rows
    right = sum(right * n for _, right, n in bins) / rows
    assert right == pytest.approx(accuracy(probe))
    gap = sum(n * abs(sure - right) for sure, right, n in bins) / rows
    assert gap == pytest.approx(probe.card.held_out[""]["ece"][1], abs=0.1)  # 10 bins for 15


def test_several_attributes_and_seeds(probes, tmp_path: Path):
    labels = {"colour": "color", "size": "size"}
    probe = probes(labels=labels, seeds={"count": 2}).run(tmp_path)[DOWN]
    assert probe.labels[:3] == ("colour=blue", "colour=green", "colour=red")
    assert set(probe.card.held_out) == {"colour", "size"}
    assert probe.card.groups["held_out"] == 6  # prompts
    assert probe.card.rows["held_out"] == 12
    assert set(notes(tmp_path)["reliability"]) == {"colour", "size"}


def test_labels_of_the_detector(probes, tmp_path: Path):
    job = probes(
        {"per_step": "shared"},
        labels={"detector": "frame"},
        data={"scenes": {"count": 12}},
        pipeline={"num_inference_steps": 6},
    )
    probe = job.run(tmp_path)[DOWN]
    assert probe.labels == ("no", "yes")
    said = [item.columns["source_frame"] for item in job.source.items]
    trained = sum(probe.card.counts.values())
    assert trained == 4 and abs(probe.card.counts["yes"] - said.count("yes") / 3) <= 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"data": {"prompts": [{"prompt": f"a {n}", "color": "red"} for n in range(9)]}}, "labels"),
        ({"data": {"prompts": PROBES["data"]["prompts"][2:4]}}, "2 groups of rows cannot be split"),
        ({"sites": "unet.nowhere"}, "unknown site"),
    ],
    ids=["one class", "two rows", "no site"],
)
def test_a_plan_refuses_what_a_run_would(probes, tmp_path: Path, change: Any, text: str):
    said = []
    for call in (lambda: probes(**change).plan(), lambda: probes(**change).run(tmp_path / "out")):
        with pytest.raises((InvalidInput, UnknownName), match=text) as error:
            call()
        said.append(str(error.value))
    assert said[0] == said[1] and not (tmp_path / "out").exists()


def test_rows_without_a_label_are_left_out():
    rows, labels = complete_rows({"a": ["x", None, "y", True], "b": [1, 2, None, 3]}, "classify")
    assert rows == [0, 3] and labels == {"a": ["x", "yes"], "b": ["1", "3"]}


def test_rows_without_a_label_train_nothing(probes, tmp_path: Path, monkeypatch):
    given: list[tuple[str, str]] = []

    def seen(recorded, labels, **more):
        given.extend(zip((row.prompt for row in recorded.rows), labels, strict=True))
        return fit(recorded, labels, **more)

    monkeypatch.setattr("dreamreader.training.prompted.fit", seen)
    rows = [dict(each) for each in PROBES["data"]["prompts"]]
    for each in rows:
        each["color"] = None if each["color"] == "green" else each["color"]
    job = probes({"per_step": "shared"}, data={"prompts": rows})
    probe = job.run(tmp_path)[DOWN]
    assert notes(tmp_path)["rows"] == {"all": 18, "labelled": 12}
    assert sum(probe.card.rows.values()) == 12
    assert len(given) == 12 and all(label in prompt for prompt, label in given)
    assert "6 had no label" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("per_step", ["shared", "noise"])
def test_numbers_are_regressed(probes, tmp_path: Path, per_step: str):
    rows = [
        {"prompt": each["prompt"], "large": int(each["size"] == "large")}
        for each in PROBES["data"]["prompts"]
    ]
    options = {"task": "regress", "per_step": per_step}
    probe = probes(options, data={"prompts": rows}, labels="large").run(tmp_path)[DOWN]
    assert probe.card.held_out[""]["r2"]["value"] is not None
    assert probe.noise_conditioned == (per_step == "noise") and notes(tmp_path)["reliability"] == {}
    assert "R2" in (tmp_path / "report.html").read_text()


def test_every_label_of_several_is_told(probes, tmp_path: Path):
    rows = [
        {"prompt": each["prompt"], "is": [each["color"], each["size"]]}
        for each in PROBES["data"]["prompts"]
    ]
    options = {"task": "multilabel", "loss": "sigmoid"}
    probe = probes(options, data={"prompts": rows}, labels="is").run(tmp_path)[DOWN]
    assert probe.labels == ("blue", "green", "large", "red", "small")
    assert sum(n for *_, n in notes(tmp_path)["reliability"][""]) == 6 * 2 * 5


def test_a_language_model(language, tmp_path: Path):
    rows = [
        {"prompt": f"the {size} {animal}", "animal": animal}
        for size in ("red", "old", "big", "new", "wet", "dry", "fat", "shy", "sad", "tall")
        for animal in ("tree", "fox")
    ]
    job = ProbeJob(
        name="animals",
        reader=language,
        data={"prompts": rows},
        labels="animal",
        sites="transformer.h.1",
        tokens=-1,
        probe={**PROBES["probe"], "per_step": "shared", "epochs": 200, "holdout": 5},
    )
    probe = job.run(tmp_path)["transformer.h.1"]
    assert accuracy(probe) == 1.0


def test_padding_of_shorter_prompts_is_no_part_of_a_mean(language, tmp_path: Path):
    prompts = [f"{start} {end}" for start in ("the", "a", "one") for end in ("fox", "big red tree")]
    rows = [{"prompt": each, "animal": each.split()[-1]} for each in prompts]
    asked = {"name": "a", "reader": language, "data": {"prompts": rows}, "labels": "animal"}
    asked["sites"] = "transformer.h.1"
    with pytest.raises(InvalidInput, match="prompts have 4 to 7 tokens, and padding would count"):
        ProbeJob(**asked, probe={"pool": "flat"}).run(tmp_path)
    for tokens, probe in ((-1, {}), (None, {"pool": "mean"}), (None, {"pool": "token"})):
        job = ProbeJob(**asked, tokens=tokens, probe={"holdout": 3, **probe})
        assert "rows    6" in job.plan()


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_a_language_model_with_prompts_of_unequal_length(language, pool: str, tmp_path: Path):
    rows = [
        {"prompt": f"the {size} {animal}", "animal": animal}
        for size in ("red", "very very red", "old", "wet", "dry", "fat", "shy and sad", "tall")
        for animal in ("tree", "fox")
    ]
    recipe = {**PROBES["probe"], "per_step": "shared", "pool": pool, "epochs": 60, "holdout": 4}
    found = {}
    for size in (1, 16):
        asked = {"name": "animals", "reader": language, "data": {"prompts": rows}, "probe": recipe}
        job = ProbeJob(**asked, labels="animal", sites="transformer.h.1", batch={"rows": size})
        found[size] = job.run(tmp_path / str(size))["transformer.h.1"]
    a, b = (each.mlps[0].weights[0] for each in found.values())
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    kept = notes(tmp_path / "16", "transformer.h.1")
    assert all(math.isfinite(each) for line in kept["reliability"][""] for each in line)


def test_a_store_gives_the_probe_of_its_rows(reader, tmp_path: Path):
    harvest = Harvest(
        name="rows",
        subject="shapes-unet",
        reader=reader,
        data=PROBES["data"],
        pipeline=PROBES["pipeline"],
        capture=[{"sites": [DOWN, MIDDLE], "dtype": "float32", "pool": "mean"}],
        store={"unit": 5},
    )
    harvest.run(tmp_path / "store")
    options = {**PROBES["probe"], "per_step": "each", "controls": True}
    (tmp_path / "spec.yaml").write_text(
        json.dumps(
            {
                **{"name": "stored", "store": "store", "labels": "color"},
                **{"sites": "unet.down_blocks.**.attn2", "probe": options},
            }
        )
    )
    job = ProbeJob.from_file(tmp_path / "spec.yaml", ["probe.epochs=60", "probe.patience=20"])
    probe = job.run(tmp_path / "out")[DOWN]
    assert list(job.source.sites) == [DOWN] and probe.steps == (0, 1) and probe.pool == "mean"
    assert accuracy(probe) > 0.8 and probe.card.subject == "shapes-unet"
    assert probe.card.rows == {"train": 12, "validation": 12, "held_out": 12}
    assert notes(tmp_path / "out")["rows"] == {"all": 18, "labelled": 18}
    assert sum(n for *_, n in notes(tmp_path / "out")["reliability"][""]) == 12
    assert "18 samples" not in repr(job.plan()) and "samples all 18, labelled 18" in job.plan()
    noisy = ProbeJob.from_file(tmp_path / "spec.yaml", ["probe.per_step=noise"])
    assert noisy.run(tmp_path / "noisy")[DOWN].noise_conditioned
    wrong = ProbeJob.from_file(tmp_path / "spec.yaml", ["probe.pool=token"])
    with pytest.raises(InvalidInput, match="stored with pool mean; give probe.pool: mean"):
        wrong.run(tmp_path / "wrong")
    with pytest.raises(InvalidInput, match="probe.jitter: rows of a store are read as they are"):
        ProbeJob.from_file(tmp_path / "spec.yaml", ["probe.jitter=0.5"])
    wrong = ProbeJob.from_file(tmp_path / "spec.yaml", ["sites=unet.up_blocks.**"])
    with pytest.raises(UnknownName, match="unknown site 'unet.up_blocks"):
        wrong.run(tmp_path / "wrong")
    with pytest.raises(InvalidInput, match="holds another training"):
        ProbeJob.from_file(tmp_path / "spec.yaml", ["labels=size"]).run(tmp_path / "out")


def test_rows_of_one_prompt_stay_in_one_part_of_a_store(reader, tmp_path: Path):
    Harvest(
        name="rows",
        subject="shapes-unet",
        reader=reader,
        data=PROBES["data"],
        seeds={"count": 2},
        pipeline={"num_inference_steps": 1},
        capture=[{"sites": DOWN, "pool": "mean"}],
    ).run(tmp_path / "store")
    job = ProbeJob(name="a", store=str(tmp_path / "store"), labels="color", probe={"holdout": 3})
    part = job.source.samples.part.reshape(18, 2)
    assert torch.equal(part[:, 0], part[:, 1]) and part.unique().tolist() == [0, 1, 2]


def test_rows_of_merged_harvests_have_the_noise_levels_of_their_own(reader, tmp_path: Path):
    for steps in (2, 3):
        Harvest(
            name="rows",
            subject="shapes-unet",
            reader=reader,
            data=PROBES["data"],
            pipeline={"num_inference_steps": steps},
            capture=[{"sites": DOWN, "pool": "mean"}],
        ).run(tmp_path / str(steps))
    merge([tmp_path / "2", tmp_path / "3"], tmp_path / "store")
    job = ProbeJob(name="a", store=str(tmp_path / "store"), labels="color", probe={"holdout": 3})
    seen = set()
    for _, numbers, fraction, step in SplitRows(job.source, DOWN, TRAIN, 64).rows(0):
        half = numbers < 18  # those of the first harvest
        torch.testing.assert_close(fraction, step / torch.where(half, 2, 3))
        seen |= set(fraction.tolist())
    assert len(seen) == 4


def test_a_plan_says_what_will_be_read(probes):
    text = probes(seeds={"count": 2}).plan()
    for line in (DOWN, "rows    36: 18 prompts, 2 seeds", "labels  blue 12, green 12, red 12"):
        assert line in text
    assert "labels  read from the pictures" in probes(labels={"detector": "color"}).plan()


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"labels": "colr"}, UnknownName, "unknown column of labels 'colr'; nearest: color"),
        ({"sites": "unet.**.attn9"}, UnknownName, "unknown site 'unet.**.attn9'"),
        ({"branch": "conditional"}, UnknownName, "unknown branch 'conditional'"),
        (
            {"data": {"prompts": [{"prompt": str(n), "color": "red"} for n in range(9)]}},
            InvalidInput,
            "two different classes or more, got ['red']",
        ),
        (
            {"data": {"prompts": [{"prompt": "a", "color": "red"}, {"prompt": "b", "color": "b"}]}},
            InvalidInput,
            "cannot be split into rows to train on",
        ),
        ({"probe": {"task": "regress"}}, InvalidInput, "a regression needs numbers, got 'red'"),
        (
            {"probe": {"task": "multilabel"}, "labels": ["color", "size"]},
            InvalidInput,
            "one column",
        ),
        (
            {"data": {"prompts": [{"prompt": "a", "color": None}]}},
            InvalidInput,
            "labels: no row has one",
        ),
    ],
    ids=["column", "site", "branch", "one class", "split", "numbers", "lists", "no label"],
)
def test_what_does_not_fit_is_told(probes, tmp_path: Path, changes, kind, text: str):
    changes = dict(changes)
    with pytest.raises(kind) as error:
        probes(changes.pop("probe", {}), **changes).run(tmp_path)
    assert text in str(error.value)


SPEC = """\
name: a
subject: shapes-unet
data: {prompts: [a red star]}
labels: color
sites: unet.mid_block
"""


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("labels: color", "labels: {detector: hue}"), ":4: labels: unknown attribute of the dete"),
        (("labels: color", "labels: {detector: color, a: b}"), ":4: labels: detector stands alone"),
        (("sites: unet.mid_block\n", ""), ":1: the spec: sites is missing; or give store"),
        (("subject: shapes-unet\n", "store: s\n"), ":1: the spec: data is of prompts that are run"),
        (("sites:", "probe: {hiden: [3]}\nsites:"), ":5: probe.hiden: unknown field; nearest: hid"),
    ],
    ids=["attribute", "alone", "sites", "store", "field"],
)
def test_a_wrong_spec_is_told_with_file_line_and_field(tmp_path: Path, change, text: str):
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.replace(*change))
    with pytest.raises(InvalidInput) as error:
        ProbeJob.from_file(path)
    assert f"{path}{text}" in str(error.value)
