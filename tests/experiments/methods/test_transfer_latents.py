"""Latents in transfers: of a model to itself they do the same, through maps what was mapped."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from dreamreader.edits import Steer
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments import Experiment
from dreamreader.experiments.methods.sae_choice import FeatureSet
from dreamreader.experiments.methods.transfer_latents import Latents
from dreamreader.experiments.pages import page_of
from dreamreader.experiments.pages.transfer import TransferPage
from dreamreader.mapping import ActivationMap, AffineMap, map_direction
from dreamreader.sae import SAEEdit, SparseAutoencoder, TopK, map_sae

from ..conftest import PAIRS
from .test_transfer import SITE, TWIN, transfer

WIDTH = 96


def both_signs(width: int = WIDTH) -> SparseAutoencoder:
    """Two latents for each channel, one of each sign: latent j is channel j where it is above 0."""
    sae = SparseAutoencoder(width, 2 * width, TopK(width))
    eye = torch.eye(width)
    zeros = {name: torch.zeros_like(getattr(sae, name)) for name in ("b_enc", "b_dec")}
    sae.set_tensors({"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye]), **zeros})
    sae.statistics["frequency"] = torch.full((2 * width,), 0.5)
    return sae.eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("autoencoders") / "sae.safetensors"
    both_signs().save(path)
    return str(path)


def carried(file: str, feature: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Two latents, of the source and of the subject."""
    own = {"autoencoder": {"file": file}, "features": [3, 100], "native": {"file": file}}
    own = own | {"native_features": [3, 100]} | (feature or {})
    own = {name: value for name, value in own.items() if value is not None}
    method = transfer(**{"carry": "sae_feature", "feature": own, "strengths": [4.0], **changes})
    return {name: value for name, value in method.items() if value is not None}


@pytest.mark.parametrize("use", ["autoencoder", "direction"])
def test_latents_of_the_model_itself_have_the_whole_effect(experiment, tmp_path, file, use) -> None:
    method = carried(file, {"use": use}, fit=None)
    made = experiment(data={"pairs": PAIRS}, method=method, batch={"rows": 4})
    results = made.run(tmp_path / "run")
    assert results.conditions == [
        "unedited", "target_prompt", "native", "edited", "random_direction", "unmapped",
        "mean_ablated",
    ]  # fmt: skip
    digests = {
        name: [row["digest"] for row in results.of(name)]
        for name in ("unedited", "native", "random_direction", "unmapped")
    }
    assert [row["digest"] for row in results.of("edited", map="same")] == digests["native"]
    assert digests["unmapped"] == digests["native"] != digests["random_direction"]
    assert digests["unedited"] != digests["native"]
    page = page_of(results)
    assert isinstance(page, TransferPage) and page.shares()["same"].value == 1
    assert [each.title for each in page.sections()][:2] == ["Transfer", "Maps"]
    rows = [row for row in made.job.rows if row.condition == "native"]
    (edit,) = made.spec.method.edits_of(made.job, rows)
    if use == "direction":
        assert isinstance(edit, Steer)
        expected = torch.zeros(WIDTH)
        expected[3], expected[100 - WIDTH] = 1, -1
        torch.testing.assert_close(edit.direction[SITE], expected)
        return
    assert isinstance(edit, SAEEdit) and edit.features == (3, 100) and edit.op == "set"
    assert (float(torch.as_tensor(edit.value)), edit.alpha) == (4.0, [1.0, 1.0])
    rows = [row for row in made.job.rows if row.condition == "random_direction"]
    (random,) = made.spec.method.edits_of(made.job, rows)
    assert torch.equal(random.sae.W_enc, edit.sae.W_enc)
    drawn = random.sae.W_dec.detach()[3]
    assert float(drawn.norm()) == pytest.approx(1, abs=1e-5) and abs(float(drawn[3])) < 0.5
    assert torch.equal(random.sae.W_dec[4], edit.sae.W_dec[4])


@pytest.mark.parametrize("use", ["autoencoder", "direction"])
def test_what_is_set_is_the_latent_that_was_mapped(experiment, tmp_path, file, use) -> None:
    """From another site, beside a difference of means; several strengths in one batch."""
    feature = {"use": use, "native": None, "native_features": None}
    method = carried(
        file, feature, source_sites={SITE: TWIN}, maps=["ridge"], controls=[], strengths=[2.0, 5.0]
    )
    made = experiment(data={"pairs": PAIRS}, method=method, batch={"rows": 4})
    results = made.run(tmp_path / "run")
    assert results.conditions == ["unedited", "native", "edited"]
    own = made.spec.method
    rows = [row for row in made.job.rows if row.condition == "edited"]
    edits, sae = own.edits_of(made.job, rows), both_signs()
    forward = ActivationMap.load(own.map_file(tmp_path / "run", "ridge", SITE))
    assert isinstance(forward, AffineMap) and forward.card.source_site == TWIN
    if use == "direction":
        vector = torch.zeros(WIDTH)
        vector[3], vector[100 - WIDTH] = 1, -1
        torch.testing.assert_close(edits[0].direction[SITE], map_direction(forward, vector))
    else:
        backward = ActivationMap.load(own.map_file(tmp_path / "run", "ridge", SITE, "back"))
        assert isinstance(backward, AffineMap)
        expected = map_sae(sae, forward, backward)
        for edit, strength in zip(edits, (2.0, 5.0), strict=True):
            assert torch.equal(edit.sae.W_dec, expected.W_dec)
            assert torch.equal(edit.sae.b_enc, expected.b_enc)
            assert float(torch.as_tensor(edit.value)) == strength
            assert edit.alpha == [float(row.strength == strength) for row in rows]
    rows = [row for row in made.job.rows if row.condition == "native"]
    (plain,) = own.edits_of(made.job, rows)
    assert isinstance(plain, Steer) and plain.alpha == [row.strength for row in rows]


CHOOSE = {
    "label": "source_color",
    "against": "red",
    "targets": ["green"],
    "fit": {"scenes": {"count": 16}},
    "trial": {"scenes": {"count": 2, "skip": 40, "source": {"color": "red"}}},
    "trial_rows": 2,
    "candidates": 2,
    "sizes": [1],
    "where": 1,
}


def test_latents_are_chosen_in_each_model_by_what_they_do(experiment, tmp_path, file) -> None:
    feature = {"features": None, "native_features": None, "choose": CHOOSE}
    scenes = {"count": 2, "source": {"color": "red"}, "target": {"color": "green"}}
    made = experiment(
        metrics=["detector"],
        data={"scenes": scenes},
        method=carried(file, feature, effect="turned", controls=[], strengths=[1.0, 4.0]),
    )
    made.run(tmp_path / "run")
    notes = {}
    for side in ("source", "native"):
        folder = tmp_path / "run" / "artifacts" / side
        notes[side] = json.loads((folder / "choice.json").read_text())["labels"]["green"]
        assert len(notes[side]["tried"]) == 4  # two candidates, two strengths
    chosen = notes["source"]["sets"]["green, one"]
    rows = [row for row in made.job.rows if row.axes.get("map") == "same" and row.strength == 4]
    (edit,) = made.spec.method.edits_of(made.job, rows)
    assert list(edit.features) == chosen["features"] and list(edit.where) == chosen["where"]
    assert edit.value.tolist() == pytest.approx([4 * each for each in chosen["levels"]])
    assert notes["native"] == notes["source"]  # the same model, and the same seeds


def test_the_direction_of_latents_is_what_their_codes_add() -> None:
    sae = SparseAutoencoder(8, 16, TopK(4), rescale=True, normalise="average_norm", seed=3).eval()
    x = 5 * torch.randn(20, 8)
    sae.fit_normalisation(x)
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 2, 16).unsqueeze(1)
        codes = sae.encode(x)
        more = codes.clone()
        more[:, [2, 7]] += torch.tensor([2.0, 0.5])
        added = sae.decode(more) - sae.decode(codes)
    found = Latents(sae, FeatureSet((2, 7), (2.0, 0.5))).direction()
    torch.testing.assert_close(found.expand(20, 8), added, atol=1e-4, rtol=1e-4)


def test_latents_of_a_language_model(tmp_path) -> None:
    model, tokenizer = tiny.language_model("gpt2")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "gpt2")
    sae = both_signs(model.config.n_embd)
    sae.save(tmp_path / "sae.safetensors")
    file = {"file": str(tmp_path / "sae.safetensors")}

    def run(name: str, **feature: Any) -> Any:
        method = {
            "kind": "transfer",
            "carry": "sae_feature",
            "source": str(tmp_path / "gpt2"),
            "sites": "transformer.h.1",
            "map_data": {
                "prompts": [f"a {c} {s}" for c in ("red", "blue") for s in ("cat", "dog")]
            },
            "maps": [{"method": "identity", "name": "same"}],
            "feature": {"autoencoder": file, "native": file, **feature},
            "strengths": [4.0],
            "controls": ["mean_ablated"],
        }
        return Experiment(
            name="carried",
            subject=str(tmp_path / "gpt2"),
            data={"prompts": [{"prompt": "the star is", "answer": 40, "wrong_answer": 41}]},
            pipeline={},
            method=method,
            metrics=["logit_difference"],
        ).run(tmp_path / name)

    for use in ("autoencoder", "direction"):
        results = run(use, use=use, features=[3], native_features=[3])
        (native, same, plain) = (
            results.of(name)[0]["logit_difference"] for name in ("native", "edited", "unedited")
        )
        assert native == same != plain
    with pytest.raises(InvalidInput, match="chosen by pictures, which a language model lacks"):
        run("chosen", choose=CHOOSE)


def test_latents_that_cannot_be_carried(experiment, tmp_path, file) -> None:
    def run(feature: dict[str, Any] | None = None, **changes: Any) -> None:
        made = experiment(data={"pairs": PAIRS}, method=carried(file, feature, **changes))
        made.run(tmp_path / "run")

    narrow = str(tmp_path / "narrow.safetensors")
    both_signs(64).save(Path(narrow))
    for field in ("autoencoder", "native"):
        with pytest.raises(
            InvalidInput, match=rf"feature.{field}: .*narrow.* d_in=64, {SITE} of .* 96 features"
        ):
            run({field: {"file": narrow}})
    foreign = SparseAutoencoder(WIDTH, 64, TopK(8)).eval()  # what is of another site looks so
    foreign.set_tensors({"b_dec": torch.full((WIDTH,), 10.0)})
    foreign.save(tmp_path / "foreign.safetensors")
    with pytest.raises(InvalidInput, match="native: .*foreign.* explains nothing .* another site"):
        run({"native": {"file": str(tmp_path / "foreign.safetensors")}, "native_features": [3]})
    with pytest.raises(InvalidInput, match="feature.features: latent 192 is none of 192"):
        run({"features": [192]})
    with pytest.raises(InvalidInput, match="feature.native_features: latent -1 is none of 192"):
        run({"native_features": [-1]})
    with pytest.raises(InvalidInput, match="by affine maps .*, noise is none; or take feature.use"):
        run(maps=["noise"])
    with pytest.raises(InvalidInput, match="feature: says which latents .* needs carry"):
        run(carry="direction")
    with pytest.raises(InvalidInput, match="native_features: are of native; give its file"):
        run({"native": None})
    with pytest.raises(InvalidInput, match="give features .* or choose"):
        run({"features": None})
    with pytest.raises(InvalidInput, match="choose: all latents are named already"):
        run({"choose": CHOOSE})
    with pytest.raises(InvalidInput, match="give one label and one size, such as targets"):
        run({"features": None, "choose": CHOOSE | {"sizes": [1, 4]}})
    with pytest.raises(InvalidInput, match="choose.where: a direction is added at all tokens"):
        run({"features": None, "choose": CHOOSE, "use": "direction"})
    with pytest.raises(InvalidInput, match="choose.goal: what is carried is turned on"):
        run({"features": None, "choose": CHOOSE | {"goal": "remove"}})
    with pytest.raises(UnknownName, match="label of method.choose 'greenish'"):
        run({"features": None, "choose": CHOOSE | {"targets": ["greenish"]}})
    with pytest.raises(InvalidInput, match="an autoencoder is of one site, got 2 in"):
        run(sites=[SITE, TWIN])
    with pytest.raises(InvalidInput, match="fit: pairs of prompts are needed"):
        run({"native": None, "native_features": None}, fit=None)
