"""Autoencoders from specs: what is trained, beside what, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from dreamreader._progress import ProgressEvent
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.harvest import Harvest
from dreamreader.sae import BatchTopK, SampledTopK, SparseAutoencoder, train_sae
from dreamreader.sae.evaluate import score_reconstruction
from dreamreader.store.dataset import StoreDataset
from dreamreader.training import SaeJob
from tests.training.jobs import DOWN, MIDDLE, SAE

EXAMPLES = [
    each
    for each in sorted((Path(__file__).parents[2] / "examples" / "sae").glob("*.yaml"))
    if "\nautoencoders:" in each.read_text()
]
KNOWN = {
    "name": "known",
    "known_answers": {"features": 24, "d_in": 12, "roots": 3, "depth": 1, "min_probability": 0.05},
    "autoencoders": [{"d_sae": 20, "k": 2}],
    "training": {"tokens": 6400, "batch_size": 64, "lr": 0.01},
    "evaluation": {"rows": 500},
    "controls": [],
}


@pytest.fixture(scope="module")
def store(reader: Reader, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "activations"
    Harvest(
        name="rows",
        reader=reader,
        subject="shapes-unet",
        data={"prompts": ["a red circle", "a blue square"]},
        pipeline={"num_inference_steps": 2},
        capture=[{"sites": [DOWN, MIDDLE], "branch": "cond"}],
    ).run(folder, progress=False)
    return folder


def test_lists_sweep_and_seeds_and_controls_stand_beside() -> None:
    job = SaeJob(
        **KNOWN
        | {
            "autoencoders": [
                {"d_sae": 20, "k": [2, 3]},
                {"selection": "SampledTopK", "d_sae": 20, "k": 2, "l": [1, 1.5], "score": "l2"},
            ],
            "seeds": [4, 5],
            "controls": ["random_encoder"],
        }
    )
    names = [each.name for each in job.autoencoders]
    assert len(set(names)) == len(names) == 4 * 2 + 4
    assert [each.control for each in job.autoencoders].count("random_encoder") == 4
    selections = [each.spec.selection_for(each.seed) for each in job.autoencoders[:8]]
    assert selections[:4:2] == [BatchTopK(2), BatchTopK(3)]
    assert selections[5] == SampledTopK(2, l=1.0, score="l2", seed=5)


def test_on_a_store_it_is_train_sae_by_hand(store: Path, tmp_path: Path) -> None:
    spec = {
        "name": "by hand",
        "store": str(store),
        "sites": MIDDLE,
        "autoencoders": [{"d_sae": 24, "k": 2, "threshold_rule": "saelens"}],
        "training": {"epochs": 6, "batch_size": 8, "lr": 0.01},
        "controls": ["random_decoder"],
        "evaluation": {"rows": 16},
    }
    job = SaeJob(**spec)
    (trained,) = job.run(tmp_path / "run", progress=False).values()
    own, control = trained.values()
    rows = StoreDataset(store, MIDDLE, batch_size=8, seed=0, drop_last=True)
    sae = SparseAutoencoder(own.d_in, 24, BatchTopK(2), threshold_rule="saelens", seed=0)
    start = sae.W_dec.detach().clone()
    train_sae(sae, rows, epochs=6, lr=0.01, progress=False)
    assert torch.equal(own.W_dec, sae.W_dec) and not torch.equal(own.W_dec, start)
    assert torch.equal(own.threshold, sae.threshold)
    assert not torch.allclose(control.W_dec, own.W_dec, atol=0.1)
    notes = json.loads(next((tmp_path / "run" / "autoencoders").glob("*.json")).read_text())
    scores = notes["autoencoders"]["BatchTopK d=24 k=2 threshold_rule=saelens, seed 0"]["scores"]
    measured = StoreDataset(store, MIDDLE, batch_size=8, seed=2**31)
    want = score_reconstruction(sae, [batch for batch, _ in zip(measured, range(2), strict=False)])
    assert scores["fvu"] == pytest.approx(want.fvu) and scores["rows"] == 16
    assert torch.allclose(own.statistics["frequency"], want.frequency.float())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "random decoder" in page and "latents by frequency" in page
    line = SaeJob.summary(job.folder_type(tmp_path / "run"))[1]
    assert "FVU" in line
    file = line.rsplit("; ", 1)[1]
    assert Path(file).name in page and (tmp_path / "run" / file).is_file()


def test_on_known_answers_it_tells_how_many_were_found(tmp_path: Path) -> None:
    job = SaeJob(**KNOWN | {"seeds": [0, 1], "controls": ["shuffled"]})
    found = job.run(tmp_path / "run", progress=False)["known answers"]
    assert len(found) == 3
    notes = json.loads(next((tmp_path / "run" / "autoencoders").glob("*.json")).read_text())
    scores = {name: each["scores"] for name, each in notes["autoencoders"].items()}
    first, second, shuffled = scores.values()
    assert 0 < first["f1"] <= 1 and 0 < first["mcc"] <= 1 and "f1" not in shuffled
    assert first["fvu"] < 0.8 * shuffled["fvu"] and first != second
    assert 0 < notes["seed_mcc"]["BatchTopK d=20 k=2"] <= 1


def test_rows_of_a_model_go_when_they_are_not_kept(reader: Reader, tmp_path: Path) -> None:
    small = SAE | {"sites": MIDDLE, "controls": [], "autoencoders": [{"d_sae": 24, "k": 2}]}
    job = SaeJob(reader=reader, **small)
    first = job.run(tmp_path / "run", progress=False)
    assert list(first) == [MIDDLE] and not (tmp_path / "run" / "activations").exists()
    SaeJob(reader=reader, **small, keep_activations=True).run(tmp_path / "kept", progress=False)
    assert (tmp_path / "kept" / "activations" / "manifest.json").is_file()
    # a complete job runs nothing again
    again = SaeJob(reader=reader, **small).run(tmp_path / "run", progress=False)
    for name, sae in first[MIDDLE].items():
        assert torch.equal(sae.W_dec, again[MIDDLE][name].W_dec)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"store": "x"}, "give one of store, known_answers, and subject"),
        ({"known_answers": None}, "give one of store, known_answers, and subject"),
        ({"autoencoders": [{"d_sae": 8}]}, "selection BatchTopK takes k|k"),
        ({"autoencoders": [{"d_sae": 8, "k": 0}]}, "greater than 0"),
        ({"autoencoders": [{"d_sae": 8, "k": float("nan")}]}, "k"),
        ({"autoencoders": [{"d_sae": 8, "k": 2}] * 2}, "is there twice"),
        ({"training": {"tokens": 10, "batch_size": 64}}, "fewer than a batch of 64"),
        ({"training": {"batch_size": 64}}, "give one of tokens and epochs"),
        ({"training": {"epochs": 2}}, "known answers never end"),
        ({"seeds": [1, 1]}, "a seed is there twice"),
        ({"known_answers": {"features": 8, "max_probability": 0.1, "min_probability": 0.2}}, "<="),
        ({"sites": "unet"}, "known_answers have no sites"),
        ({"branch": "cond"}, "branch: known_answers have none"),
        ({"pipeline": {"num_inference_steps": 2}}, "pipeline: is of a subject that is run"),
        ({"autoencoders": [{"d_sae": 8, "k": []}]}, "k: is empty"),
        ({"autoencoders": [{"d_sae": 8, "k": 9}]}, "k is at most d_sae, which is 8"),
        ({"autoencoders": [{"d_sae": [20, 8], "k": 9}]}, "k is at most d_sae, which is 8"),
        ({"autoencoders": [{"d_sae": 8, "k": 2, "groups": [9]}]}, "ascending widths up to d_sae=8"),
        ({"evaluation": {"curve": [0]}}, "greater than or equal to 1"),
        ({"evaluation": {"curve": [6401]}}, "6,401 rows are more than training.tokens, 6,400"),
    ],
)
def test_specs_that_cannot_be_right_are_refused(changes: dict, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        SaeJob(**KNOWN | changes)


def test_scores_along_a_training_are_those_of_shorter_ones(tmp_path: Path) -> None:
    training = KNOWN["training"] | {"schedule": "constant", "warmup": 0}
    job = KNOWN | {"training": training, "evaluation": {"rows": 500, "curve": [1280, 3200]}}
    SaeJob(**job).run(tmp_path / "whole", progress=False)
    short = job | {"training": training | {"tokens": 3200}, "evaluation": {"rows": 500}}
    SaeJob(**short).run(tmp_path / "short", progress=False)
    (whole,), (part,) = (_notes(tmp_path / name) for name in ("whole", "short"))
    assert [each.pop("trained") for each in whole["curve"]] == [1280, 3200]
    scores = {name: each for name, each in part["scores"].items() if name != "histogram"}
    assert whole["curve"][1] == scores and whole["curve"][0] != scores
    assert whole["scores"] != part["scores"]
    assert "10^6 rows" in (tmp_path / "whole" / "report.html").read_text()
    assert part["curve"] == []


def test_a_curve_goes_on_where_a_stopped_training_was(tmp_path: Path) -> None:
    spec = KNOWN | {"evaluation": {"rows": 500, "curve": [640, 3200]}}
    spec["training"] = KNOWN["training"] | {"save_every": 20}

    def stop(event: ProgressEvent) -> None:
        if event.stage == "training" and event.done == 45:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SaeJob(**spec).run(tmp_path / "stopped", progress=stop)
    for name in ("stopped", "whole"):
        SaeJob(**spec).run(tmp_path / name, progress=False)
    (stopped,), (whole,) = (_notes(tmp_path / name) for name in ("stopped", "whole"))
    assert stopped == whole and len(whole["curve"]) == 2


def test_at_one_budget_all_have_the_same_number_of_active_latents(tmp_path: Path) -> None:
    autoencoders = [
        {"d_sae": 20, "k": 2},
        {"selection": "SampledTopK", "d_sae": 20, "k": 2, "l": 2, "dead_after": 640}
        | {"threshold_rule": "saelens"},
    ]
    job = KNOWN | {"autoencoders": autoencoders}
    job["evaluation"] = {"rows": 512, "inference": "budget"}
    found = SaeJob(**job).run(tmp_path / "run", progress=False)["known answers"]
    batch, sampled = _notes(tmp_path / "run")
    assert batch["scores"]["l0"] == sampled["scores"]["l0"] == 2
    assert sampled["scores"]["own_l0"] != 2
    own = list(found.values())[1]
    assert own.selection == SampledTopK(2, l=2, seed=0) and own.aux.dead_after == 640
    assert own.inference == "threshold"


def test_too_few_rows_are_seen_before_the_model_is_run(reader: Reader, tmp_path: Path) -> None:
    small = SAE | {"sites": MIDDLE, "controls": [], "autoencoders": [{"d_sae": 24, "k": 2}]}
    job = SaeJob(reader=reader, **small | {"training": {"epochs": 1, "batch_size": 100_000}})
    with pytest.raises(InvalidInput, match=r"batch_size: .* gives \d+ rows, fewer than 100,000"):
        job.run(tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "activations").exists()
    with pytest.raises(InvalidInput, match="take more prompts or seeds"):
        job.plan()


def _notes(folder: Path) -> list[dict]:
    text = next((folder / "autoencoders").glob("*.json")).read_text()
    return list(json.loads(text)["autoencoders"].values())


def test_a_calibrated_threshold_keeps_what_the_budget_says(tmp_path: Path) -> None:
    found = {}
    for inference in ("own", "calibrated"):
        spec = KNOWN | {
            "autoencoders": [{"selection": "SampledTopK", "d_sae": 20, "k": 2, "l": 1}],
            "evaluation": {"rows": 500, "inference": inference},
        }
        SaeJob(**spec).run(tmp_path / inference, progress=False)
        (found[inference],) = (each["scores"] for each in _notes(tmp_path / inference))
    assert abs(found["own"]["l0"] - 2) > 0.3
    assert found["calibrated"]["l0"] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda each: each.stem)
def test_examples_can_be_run(file: Path) -> None:
    job = SaeJob.from_file(file)
    assert job.autoencoders
    if job.spec.known_answers is not None:
        assert "known answers, width" in job.plan()


def test_stores_that_do_not_fit_are_refused(store: Path, tmp_path: Path) -> None:
    spec = {k: v for k, v in KNOWN.items() if k != "known_answers"} | {"store": str(store)}
    with pytest.raises(UnknownName, match="unet.nothing"):
        SaeJob(**spec, sites="unet.nothing").run(tmp_path / "a", progress=False)
    with pytest.raises(InvalidInput, match="has 16 rows, fewer than 64"):
        SaeJob(**spec, sites=MIDDLE).run(tmp_path / "b", progress=False)
    with pytest.raises(InvalidInput, match="is no store|no store"):
        SaeJob(**spec | {"store": str(tmp_path)}).run(tmp_path / "c", progress=False)
