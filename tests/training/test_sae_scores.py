"""What autoencoders are worth to a model: splices, probes of attributes, thresholds."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.harvest import Harvest
from dreamreader.ops import SparseRows
from dreamreader.sae import BatchTopK, SparseAutoencoder, TopK, train_sae
from dreamreader.sae.evaluate import probe_latents, score_absorption, score_reconstruction
from dreamreader.store.store import Store
from dreamreader.training import SaeJob
from dreamreader.training.sae_attributes import PooledRows, attributes_of, score_attributes
from dreamreader.training.sae_page import describe_unsettled, is_settled
from dreamreader.training.sae_scores import compare_selection
from dreamreader.training.sae_splice import (
    SpliceScores,
    SpliceTest,
    harvest_of,
    splice_numbers,
    splice_test_of,
)
from tests.training.jobs import MIDDLE

BLOCK = "transformer.h.1"
TEXTS = ["one two three four five", "a red circle", "seven eight nine ten"]


@pytest.fixture(scope="module")
def store(reader: Reader, tmp_path_factory) -> Store:
    """Three colours in two shapes, 48 prompts, one step."""
    prompts = [
        {"prompt": f"a {size} {color} {shape}", "color": color, "shape": shape, "n": number}
        for number, (size, color, shape) in enumerate(
            (size, color, shape)
            for size in ("small", "large", "big", "tiny", "nice", "new", "old", "odd")
            for color in ("red", "blue", "green")
            for shape in ("circle", "square")
        )
    ]
    return Harvest(
        name="rows",
        reader=reader,
        subject="shapes-unet",
        data={"prompts": prompts},
        pipeline={"num_inference_steps": 1},
        capture=[{"sites": MIDDLE, "branch": "cond", "dtype": "float32"}],
        batch={"rows": 8},
    ).run(tmp_path_factory.mktemp("attributes") / "store", progress=False)


def by_hand(reader: Reader, texts: list[str], change) -> list[float]:
    """Cross-entropy of texts, one after the other, with a plain hook on the block."""
    model, found = reader.subject, []
    hook = model.get_submodule(BLOCK).register_forward_hook(
        lambda module, given, out: (
            change(out) if torch.is_tensor(out) else (change(out[0]), *out[1:])
        )
    )
    with hook, torch.no_grad():
        for text in texts:
            ids = torch.tensor([reader.tokenizer(text)["input_ids"]])
            logits = model(input_ids=ids).logits
            found.append(float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])))
    return found


def test_a_spliced_language_model_is_one_with_a_plain_hook(language: Reader) -> None:
    width = language.subject.config.n_embd
    sae = SparseAutoencoder(width, 40, TopK(3), seed=3).eval()
    mean = torch.linspace(-1, 1, width)
    found = SpliceTest(language, BLOCK, TEXTS, mean=mean).score(sae)
    wanted = {
        "clean": lambda x: x,
        "spliced": lambda x: sae(x),
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
    }
    assert found.measure == "cross_entropy" and found.prompts == 3
    for name, change in wanted.items():
        mean_loss = sum(by_hand(language, TEXTS, change)) / 3
        assert getattr(found, name) == pytest.approx(mean_loss, rel=1e-4), name
    assert found.error_kept == found.clean != found.spliced
    share = (found.zero - found.spliced) / (found.zero - found.clean)
    assert found.recovered == pytest.approx(share)


def test_nothing_is_recovered_where_zeros_do_no_worse() -> None:
    found = SpliceScores("cross_entropy", 7.28, 7.29, 7.28, 7.23, 7.30, 3)
    assert math.isnan(found.recovered) and found.recovered_of_mean == pytest.approx(0.5)
    assert splice_numbers(found)["recovered"] is None


def test_a_spliced_pipeline_draws_what_a_plain_hook_draws(reader: Reader) -> None:
    more = {"num_inference_steps": 2, "guidance_scale": 2.0}
    module = reader.subject.unet.get_submodule(MIDDLE.removeprefix("unet."))
    width = module.to_out[0].out_features
    sae = SparseAutoencoder(width, 64, TopK(4), seed=1).eval()
    prompts, seeds = ["a red circle", "a blue square"], [3, 4]
    test = SpliceTest(reader, MIDDLE, prompts, seeds, None, {}, more)
    found = test.score(sae)

    def draw(change) -> torch.Tensor:
        with module.register_forward_hook(lambda m, given, out: change(out)):
            run = reader.run(prompts, seeds=seeds, progress=False, output_type="pt", **more)
        return torch.stack(list(run.images)).double()

    clean = draw(lambda x: x)
    for name, change in (("spliced", sae), ("zero", torch.zeros_like)):
        gap = (draw(change) - clean).flatten(1).square().mean(1).sqrt().mean()
        assert getattr(found, name) == pytest.approx(float(gap), rel=1e-3), name
    assert found.clean == found.error_kept == 0 and math.isnan(found.mean)
    assert 0 < found.spliced < found.zero


def test_a_splice_is_where_the_autoencoder_learned(reader: Reader, store: Store) -> None:
    harvest = harvest_of(store, reader)
    sae = SparseAutoencoder(store.sites[MIDDLE].width, 32, TopK(2)).eval()
    mean = torch.zeros(sae.d_in)
    tests = [
        splice_test_of(harvest, MIDDLE, 2, mean, branch=branch, steps=None, tokens=None)
        for branch in ("cond", "uncond", None)
    ]
    assert tests[0].prompts == ["a small red circle", "a small red square"]
    assert "output_type" not in tests[0].arguments
    scores = [each.score(sae) for each in tests]
    assert len({each.spliced for each in scores}) == 3
    assert scores[0].mean == scores[0].zero  # a mean of zeros


def test_probes_and_absorption_are_those_of_pooled_codes(store: Store) -> None:
    attributes = attributes_of(store, ["color", "shape"], 48)
    assert attributes is not None
    assert attributes.names == [
        *("color=blue", "color=green", "color=red", "shape=circle", "shape=square")
    ]
    sae = SparseAutoencoder(store.sites[MIDDLE].width, 48, TopK(4), seed=2).eval()
    pooled = PooledRows(store, MIDDLE, 48, {})
    read = store.read(MIDDLE)
    sample = torch.tensor([int(each) for each in read.keys["id"].to_pylist()])
    with torch.no_grad():
        codes = sae.encode(read.values)
    mean = torch.stack([codes[sample == n].mean(0) for n in range(48)])
    x = torch.stack([read.values[sample == n].mean(0) for n in range(48)])
    assert torch.allclose(pooled.codes(sae).dense(), mean, atol=1e-6)
    assert torch.allclose(pooled.activations(), x, atol=1e-5)
    found = score_attributes(pooled.codes(sae), attributes, sae, x)
    own = SparseRows.from_dense(mean)
    probes = probe_latents(own, attributes.labels, attributes.held_out, k=(1, 2, 5))
    for k in (1, 2, 5):
        want = float(probes[k].auroc.mean())
        assert found["probes"][str(k)]["auroc"] == pytest.approx(want, abs=1e-6)
    absorbed = score_absorption(sae, x, attributes.labels, attributes.held_out, codes=own)
    assert found["absorbed"] == pytest.approx(float(absorbed.absorbed.mean()), abs=1e-6)
    assert found["silent"] == pytest.approx(float(absorbed.silent.mean()), abs=1e-6)
    few = SparseRows.from_dense(mean[:9])
    with pytest.raises(InvalidInput, match="codes of 9 rows for 48 of x"):
        score_absorption(sae, x, attributes.labels, attributes.held_out, codes=few)


def test_attributes_that_cannot_be_probed(store: Store) -> None:
    assert attributes_of(store, None, 48) is None  # no scenes
    assert attributes_of(store, [], 48) is None
    with pytest.raises(UnknownName, match="colour"):
        attributes_of(store, ["colour"], 48)
    with pytest.raises(InvalidInput, match="no value has 4 samples with and without"):
        attributes_of(store, ["n"], 48)
    found = attributes_of(store, ["color", "n"], 48)
    assert found is not None and found.left_out == 48 and len(found.names) == 3


def test_scenes_are_probed_for_what_captions_say(reader: Reader, tmp_path: Path) -> None:
    harvest = Harvest(
        name="scenes",
        reader=reader,
        subject="shapes-unet",
        data={"scenes": {"count": 40, "unsaid": ["size"]}},
        pipeline={"num_inference_steps": 1},
        capture=[{"sites": MIDDLE, "tokens": [0], "branch": "cond"}],
    )
    found = attributes_of(harvest.run(tmp_path / "store", progress=False), None, 40)
    assert found is not None
    columns = {name.partition("=")[0] for name in found.names}
    assert "color" in columns and "shape" in columns and "size" not in columns
    assert 0 < int(found.held_out.sum()) < 40


def test_the_job_and_its_page_have_all_of_them(reader: Reader, tmp_path: Path) -> None:
    job = SaeJob(
        name="scores",
        reader=reader,
        subject="shapes-unet",
        data={"scenes": {"count": 48}},
        sites=MIDDLE,
        branch="cond",
        pipeline={"num_inference_steps": 1},
        autoencoders=[
            {"d_sae": 32, "k": 2, "threshold_rule": "saelens"},
            {"d_sae": 32, "k": 3},  # whose threshold begins after a thousand steps
        ],
        training={"tokens": 640, "batch_size": 64, "lr": 0.01},
        evaluation={"rows": 128, "splice": 2, "samples": 48},
        controls=["random_decoder"],
        seeds=[0, 1],
    )
    trained = job.run(tmp_path / "run", progress=False)[MIDDLE]
    notes = json.loads(next((tmp_path / "run" / "autoencoders").glob("*.json")).read_text())
    scores = {name: each["scores"] for name, each in notes["autoencoders"].items()}
    assert len(scores) == len(trained) == 6
    for name, each in scores.items():
        if "k=3" in name:
            assert each["no_threshold"] and "splice" not in each
            continue
        assert set(each["probes"]) == {"1", "2", "5"} and 0 <= each["absorbed"] <= each["silent"]
        assert each["splice"]["prompts"] == 2 and each["splice"]["error_kept"] == 0
        assert "l0_in_training" in each and "lottery" in each
    assert set(notes["activations"]["probes"]) == {"1", "2", "5"}
    page = (tmp_path / "run" / "report.html").read_text()
    for text in ("attributes", "splice", "the activations themselves", "seed MCC", "not settled"):
        assert text in page, text
    assert "No threshold yet" in page and "random decoder" in page and "color=" in page


def test_what_training_keeps_stands_beside_what_inference_keeps() -> None:
    torch.manual_seed(0)
    rows = [torch.randn(64, 8) for _ in range(40)]
    sae = SparseAutoencoder(8, 32, BatchTopK(3), threshold_rule="saelens")
    train_sae(sae, rows, epochs=1, lr=0.01, progress=False)
    found = compare_selection(sae, rows[:4])
    other = copy.deepcopy(sae)
    other.inference = "selection"
    want = score_reconstruction(other, rows[:4])
    assert found == {"fvu_in_training": pytest.approx(want.fvu), "l0_in_training": 3.0}
    here = score_reconstruction(sae, rows[:4])
    scores = {"l0": here.l0, "fvu": here.fvu, **found}
    assert here.l0 > 4 and not is_settled(scores)  # forty steps: the threshold is far too low
    (line,) = describe_unsettled({"mine": scores})
    assert "mine: L0" in line and "3 and" in line and "500" in line
    train_sae(sae, rows, epochs=13, lr=1e-5, progress=False)
    here = score_reconstruction(sae, rows[:4])
    assert is_settled({"l0": here.l0, "fvu": here.fvu, **compare_selection(sae, rows[:4])})
    assert compare_selection(SparseAutoencoder(8, 32, TopK(2)).eval(), rows) == {}


@pytest.mark.parametrize(
    ("evaluation", "text"),
    [
        ({"splice": 2}, "evaluation.splice: is of a model"),
        ({"attributes": ["color"]}, "evaluation.attributes: is of a model"),
        ({"splice": -1}, "greater than or equal to 0"),
        ({"samples": 0}, "greater than or equal to 1"),
    ],
)
def test_evaluations_that_cannot_be_right(evaluation: dict, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        SaeJob(
            name="known",
            known_answers={"features": 24, "d_in": 12, "roots": 3, "depth": 1},
            autoencoders=[{"d_sae": 20, "k": 2}],
            training={"tokens": 640, "batch_size": 64},
            evaluation=evaluation,
        )


def test_a_store_of_no_harvest_cannot_be_run_again(store: Store, tmp_path: Path) -> None:
    bare = copy.copy(store)
    bare.manifest = type(store.manifest)()
    with pytest.raises(InvalidInput, match="0 harvests; the subject and prompts of one are needed"):
        harvest_of(bare)
    with pytest.raises(InvalidInput, match="there are no prompts"):
        SpliceTest(harvest_of(store).job.reader, MIDDLE, [])
