"""Pages and files of latents."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import dreamreader as dr
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.sae import (
    FeatureExamples,
    SparseAutoencoder,
    TopK,
    write_dashboard,
    write_neuronpedia,
)


def collect(rows: int = 6, tokens: int = 4, steps: int = 2, **options) -> FeatureExamples:
    found = FeatureExamples(SparseAutoencoder(6, 20, TopK(3), seed=1).eval(), top=3)
    x = torch.randn(rows, steps, tokens, 6, generator=torch.Generator().manual_seed(0))
    found.add_tensor(x, **options)
    return found


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (40 * n, 0, 0)) for n in range(count)]


def test_a_page_of_a_pipeline_shows_pictures_maps_and_attributes(tmp_path: Path):
    reader = dr.load("shapes-unet")
    site = "unet.mid_block.attentions.0"
    settings = dr.zoo.settings(num_inference_steps=3)
    prompts = ["a red circle", "a blue circle", "a green star"]
    result, cache = reader.run_with_cache(prompts, sites=[site], seeds=1, **settings)
    activation = cache[site].select(branch="cond")
    width = activation.shape[-1]
    found = FeatureExamples(SparseAutoencoder(width, 4 * width, TopK(4)).eval(), top=2)
    found.add(activation, labels={"colour": ["red", "blue", "green"]})
    path = write_dashboard(
        found, tmp_path / "page.html", images=result, order="correlation", count=3, names={7: "x"}
    )
    page = path.read_text()
    shown = re.findall(r"<h2[^>]*>\s*Latent (\d+)", page)
    assert len(shown) == 3
    related = found.correlations()
    strongest = max(float(each.abs().nan_to_num(0).amax()) for each in related.values())
    first = max(abs(float(each[int(shown[0])])) for each in related.values())
    assert first == pytest.approx(strongest)
    assert page.count("data:image/png") >= 2 * 3 and "colour=" in page and "Activity" in page


def test_a_page_of_texts_escapes_them_and_leaves_padding_out(tmp_path: Path):
    padding = torch.zeros(6, 1, 4, dtype=torch.bool)
    padding[:, :, 3] = True
    found = collect(steps=1, padding=padding)
    texts = [["<b>", " is", f" {n}"] for n in range(6)]
    feature = int(found.fired.argmax())
    page = write_dashboard(
        found, tmp_path / "page.html", texts=texts, features=[feature], names={feature: "<i>"}
    ).read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert f"Latent {feature}: &lt;i&gt;" in page
    with pytest.raises(InvalidInput, match="a text has 2 pieces for 3 tokens"):
        write_dashboard(found, tmp_path / "p.html", texts=[["a", "b"]] * 6, features=[feature])


def test_neuronpedia_objects_hold_the_strongest_texts(tmp_path: Path):
    found = collect(steps=1)
    texts = [[f"{n}.{t}" for t in range(4)] for n in range(6)]
    path = write_neuronpedia(found, tmp_path / "f.json", texts, model="gpt2-small", source="6-res")
    listed = json.loads(path.read_text())
    assert [int(each["index"]) for each in listed] == found.fired.nonzero().squeeze(1).tolist()
    for each in listed:
        own = found.of(int(each["index"]))
        best = each["activations"][0]
        assert best["tokens"] == texts[own.rows[0]]
        assert best["maxValue"] == pytest.approx(own.scores[0]) == each["maxActApprox"]
        assert best["values"][best["maxValueTokenIndex"]] == best["maxValue"]
    with pytest.raises(InvalidInput, match="several steps"):
        write_neuronpedia(collect(), tmp_path / "f.json", texts, model="a", source="b")
    with pytest.raises(InvalidInput, match="2 texts for 6 rows"):
        write_neuronpedia(found, tmp_path / "f.json", texts[:2], model="a", source="b")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(images=pictures(2)), "2 images for 6 rows"),
        (dict(), "give images or texts"),
        (dict(images=pictures(6), features=[20]), "latent 20 of 20 is none"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments: dict, text: str, tmp_path: Path):
    with pytest.raises(InvalidInput, match=text):
        write_dashboard(collect(), tmp_path / "page.html", **arguments)
    with pytest.raises(UnknownName, match="order of a dashboard 'size'"):
        write_dashboard(collect(), tmp_path / "page.html", images=pictures(6), order="size")
