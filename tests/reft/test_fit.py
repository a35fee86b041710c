"""From two lists of prompts to adapters in one call."""

from typing import Any

import pytest
import torch
from reft.subjects import BASE, LAYER, SITES, TEACHER, language, pipeline, settings

import dreamreader as dr
from dreamreader._progress import ProgressEvent
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.reft import ActivationMatch, fit_pairs, record_pairs
from dreamreader.reft.batches import Batches


@pytest.mark.parametrize(
    "given",
    [
        {"lr": 0.03},
        {"lr": 0.03, "per_step": True, "variant": "direft", "keep": ["a house", "a cat"]},
        {"lr": 0.03, "loss": "noise", "trajectory": "teacher", "batch_size": 4},
        {"lr": 0.03, "loss": "noise", "keep": ["a house"], "batch_size": 4},
    ],
    ids=["activations", "per step and keep", "noise", "noise and keep"],
)
def test_pairs_are_fitted(given: dict[str, Any]):
    losses: list[float] = []

    def follow(event: ProgressEvent) -> None:
        if event.stage == "training":  # and not the recording before it
            losses.append(event.numbers["loss"])

    reft = fit_pairs(
        pipeline(),
        BASE,
        TEACHER,
        SITES,
        rank=4,
        settings=settings(),
        steps=25,
        progress=follow,
        **given,
    )
    assert len(losses) == 25 and sum(losses[-5:]) < 0.97 * sum(losses[:5])
    asked = {"seeds": 3, "output_type": "latent", **settings()}
    found = pipeline().run("a cat", edits=reft.edits(branch="cond"), **asked)
    assert not torch.equal(found.images, pipeline().run("a cat", **asked).images)
    assert reft.steps == (3 if given.get("per_step") else None)


def test_it_is_what_its_parts_give():
    reft = dr.reft.fit_pairs(pipeline(), BASE, TEACHER, SITES, settings=settings(), steps=4)
    pairs = record_pairs(pipeline(), BASE, TEACHER, SITES, **settings())
    other = dr.reft.Reft.for_sites(pipeline(), SITES, 8, **settings())
    dr.reft.train(other, ActivationMatch(pairs), steps=4, batch_size=64)
    for mine, wanted in zip(reft.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_pairs_of_a_language_model_are_fitted():
    reader = language()
    reft = fit_pairs(
        reader, BASE, TEACHER, LAYER, rank=4, tokens=[-2, -1], steps=60, batch_size=4, lr=0.05
    )
    pairs = record_pairs(reader, BASE, TEACHER, LAYER, tokens=[-2, -1])
    value = Batches(ActivationMatch(pairs), 4, 0.0, 0)
    with torch.no_grad():
        left = float(value.loss.terms(reft, value[0])[LAYER])
    assert left < 0.5
    plain = reader.run("a red cat").output.logits
    edited = reader.run("a red cat", edits=reft.edits()).output.logits
    assert not torch.equal(edited, plain)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"teacher": TEACHER[:2]}, InvalidInput, "got 4 base and 2 teacher prompts"),
        ({"loss": "noises"}, UnknownName, "unknown loss of pairs 'noises'; nearest: noise"),
        ({"sites": "unet.mid"}, UnknownName, "unknown site 'unet.mid'"),
        ({"rank": 33}, InvalidInput, "rank 33: from 1 to the width, 32, is possible"),
        (
            {"loss": "noise", "trajectory": "own"},
            InvalidInput,
            "trajectory 'own': predictions are matched on the same latents",
        ),
    ],
    ids=["lengths", "loss", "site", "rank", "trajectory"],
)
def test_wrong_inputs_say_what_is_wrong(given: dict[str, Any], kind: type[Exception], text: str):
    asked: dict[str, Any] = {"teacher": TEACHER, "sites": SITES[1]}
    with pytest.raises(kind, match=text):
        fit_pairs(pipeline(), BASE, settings=settings(2), steps=1, **asked | given)
