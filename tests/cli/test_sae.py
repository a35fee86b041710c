"""`dreamreader sae` on small autoencoders."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dreamreader.cli import app
from dreamreader.harvest import Harvest
from dreamreader.sae import SparseAutoencoder, TopK, read_sae

SITE = "unet.mid_block.attentions.0"


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["sae", *map(str, arguments)])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A store, and an autoencoder of its site."""
    folder = tmp_path_factory.mktemp("sae")
    store = Harvest(
        name="rows",
        subject="shapes-unet",
        data={"prompts": ["a red circle", "a blue square"]},
        pipeline={"num_inference_steps": 1},
        capture=[{"sites": SITE}],
    ).run(folder / "store", progress=False)
    width = store.sites[SITE].width
    sae = SparseAutoencoder(width, 64, TopK(4), metadata={"site": SITE})
    sae.save(folder / "sae.safetensors")
    return folder


def test_eval_prints_scores_beside_controls(place: Path) -> None:
    found = run("eval", place / "sae.safetensors", "--store", place / "store", "--json")
    assert found.exit_code == 0, found.output
    scores = json.loads(found.output)
    assert list(scores)[0] == "autoencoder" and len(scores) == 4
    assert scores["autoencoder"]["l0"] == 4
    table = run("eval", place / "sae.safetensors", "--store", place / "store", "--rows", 8).output
    assert "shuffled rows" in table and "FVU" in table


def test_eval_splices_and_writes_a_page(place: Path, tmp_path: Path) -> None:
    arguments = [place / "sae.safetensors", "--store", place / "store", "--splice", 2]
    found = run("eval", *arguments, "--json", "-o", tmp_path / "eval.html")
    assert found.exit_code == 0, found.output
    scores = json.loads(found.output)
    for name in ("autoencoder", "random decoder", "random encoder"):
        splice = scores[name]["splice"]
        assert splice["measure"] == "pixel_distance" and splice["prompts"] == 2
        assert splice["error_kept"] == 0 < splice["spliced"]
    page = (tmp_path / "eval.html").read_text()
    assert "random encoder" in page and "recovered of zeros" in page
    table = run("eval", *arguments).output
    assert "recovered" in table and "AUROC" not in table
    wrong = run("eval", *arguments, "--attributes", "colour")
    assert wrong.exit_code and "colour" in wrong.output and "Traceback" not in wrong.output


def test_dashboard_writes_a_page(place: Path, tmp_path: Path) -> None:
    page = tmp_path / "latents.html"
    arguments = ["-n", 3, "--steps", 1, "--shown", 4, "-o", page]
    found = run("dashboard", place / "sae.safetensors", *arguments)
    assert found.exit_code == 0, found.output
    assert "shape=" in page.read_text() and page.read_text().count("<h2") >= 5
    texts = tmp_path / "texts.txt"
    texts.write_text("a red circle\n\na blue star\n")
    more = ["--prompts", texts, "--steps", 1, "--features", "3,5", "-o", page]
    assert run("dashboard", place / "sae.safetensors", *more).exit_code == 0
    assert "Latent 3" in page.read_text() and "Latent 5" in page.read_text()
    texts.write_text("\n")
    wrong = run("dashboard", place / "sae.safetensors", "--features", "3,x")
    assert wrong.exit_code and "numbers of latents" in wrong.output
    wrong = run("dashboard", place / "sae.safetensors", "--neuronpedia", tmp_path / "n.json")
    assert wrong.exit_code and "this model draws pictures" in wrong.output
    wrong = run("dashboard", place / "sae.safetensors", "--prompts", texts)
    assert wrong.exit_code and "has no texts" in wrong.output


def test_convert_there_and_back(place: Path, tmp_path: Path) -> None:
    sae = SparseAutoencoder.load(place / "sae.safetensors")
    there = run("convert", place / "sae.safetensors", tmp_path / "lens", "--to", "saelens")
    assert there.exit_code == 0, there.output
    assert run("convert", tmp_path / "lens", tmp_path / "back.safetensors").exit_code == 0
    x = torch.randn(5, sae.d_in)
    again = SparseAutoencoder.load(tmp_path / "back.safetensors")
    assert torch.allclose(read_sae(tmp_path / "lens")(x), again(x))
    assert torch.allclose(sae(x), again(x), atol=1e-5)


def test_what_cannot_be_opened_is_an_error_in_words(place: Path, tmp_path: Path) -> None:
    missing = run("eval", tmp_path / "nothing.safetensors", "--store", place / "store")
    assert missing.exit_code and "nothing" in missing.output and "Traceback" not in missing.output
    other = SparseAutoencoder(8, 16, TopK(2), metadata={"site": SITE})
    other.save(tmp_path / "narrow.safetensors")
    wrong = run("eval", tmp_path / "narrow.safetensors", "--store", place / "store")
    assert wrong.exit_code and "the autoencoder has d_in=8" in wrong.output


@pytest.mark.llm
def test_dashboard_of_a_language_model_shows_texts_and_exports_them(
    smollm2: None, tmp_path: Path
) -> None:
    sae = SparseAutoencoder(576, 64, TopK(4), metadata={"site": "model.layers.14.mlp"})
    sae.save(tmp_path / "sae.safetensors")
    texts = tmp_path / "texts.txt"
    texts.write_text("a red circle in the middle\nthe quick brown fox\n")
    own = [tmp_path / "sae.safetensors", "-m", "smollm2-135m"]
    wrong = run("dashboard", *own)
    assert wrong.exit_code and "give --prompts" in wrong.output
    more = ["--prompts", texts, "--shown", 3, "-o", tmp_path / "p.html"]
    found = run("dashboard", *own, *more, "--neuronpedia", tmp_path / "n.json")
    assert found.exit_code == 0, found.output
    assert "circle" in (tmp_path / "p.html").read_text()
    listed = json.loads((tmp_path / "n.json").read_text())
    assert listed[0]["modelId"] == "smollm2-135m" and listed[0]["layer"] == "model.layers.14.mlp"
    best = listed[0]["activations"][0]
    assert "".join(best["tokens"]) in texts.read_text().splitlines()
    assert best["maxValue"] == max(best["values"]) == best["values"][best["maxValueTokenIndex"]]
