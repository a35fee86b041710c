"""Equal prompts of a batch go through the text encoders once, and nothing else changes."""

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch

from dreamreader.edits import Scale
from dreamreader.engine import Reader, Record, Watch
from dreamreader.experiments.encode import encode_once

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
PROMPTS = ["a red circle", "a blue square", "a red circle", "a star", "a red circle"]
LAYER = "text_encoder.encoder.layers.0.mlp"


@pytest.fixture
def seen(reader: Reader) -> Iterator[list[int]]:
    """Rows of every call of the first layer of the text encoder."""
    found: list[int] = []
    module = reader.subject.text_encoder.get_submodule(LAYER.removeprefix("text_encoder."))
    handle = module.register_forward_pre_hook(lambda m, args: found.append(len(args[0])))
    yield found
    handle.remove()


def drawn(reader: Reader, once: bool = True, **requests: Any) -> Any:
    listed = [each for some in requests.values() for each in some]
    with torch.inference_mode():
        if not once:
            return reader.run(PROMPTS, seeds=range(5), **requests, **SETTINGS)
        with encode_once(reader, listed):
            return reader.run(PROMPTS, seeds=range(5), **requests, **SETTINGS)


def test_each_prompt_is_encoded_once_and_the_pictures_stay(reader, seen) -> None:
    each = drawn(reader, once=False)
    assert seen == [5, 5]
    seen.clear()
    once = drawn(reader)
    assert seen == [3, 1]  # three prompts, and the empty one of guidance
    assert (once.images - each.images).abs().max() < 1e-3
    seen.clear()
    drawn(reader, once=False)
    assert seen == [5, 5]  # no hook stays


@pytest.mark.parametrize(
    "requests",
    [
        {"edits": [Scale(LAYER, 0.5, rows=[2])]},
        {"edits": [Scale("**.encoder.layers.*.mlp", 0.5, rows=[2])]},
        {"edits": [Scale("text_encoder", 0.5, rows=[2])]},
        {"record": [Record(LAYER)]},
        {"edits": [Scale("unet.**.attn2:k", 0.5, tokens="a", rows=[0, 2])]},
        {"record": [Watch("unet.**.attn2:probs", lambda attention, call: None)]},
    ],
    ids=["site", "glob", "whole", "record", "word", "watch"],
)
def test_every_row_is_encoded_where_rows_matter(reader, seen, requests) -> None:
    found = drawn(reader, **requests)
    assert seen == [5, 5]
    plain = drawn(reader, once=False, **requests)
    assert torch.equal(found.images, plain.images)


def test_an_edit_elsewhere_does_not_matter(reader, seen) -> None:
    drawn(reader, edits=[Scale("unet.mid_block", 0.5)], record=[Record("unet.mid_block")])
    assert seen == [3, 1]


@pytest.mark.parametrize("name", ["sdxl", "sd3", "pixart-sigma"])
def test_pipelines_with_several_encoders_and_masks(name) -> None:
    reader = Reader(tiny.pipeline(name))
    settings = {**tiny.arguments(name), "output_type": "pt", "seeds": [0, 1, 2]}
    prompts = ["a cat", "a red dog on a tree", "a cat"]
    plain = reader.run(prompts, **settings).images
    with encode_once(reader):
        once = reader.run(prompts, **settings).images
    assert (once - plain).abs().max() < 1e-3
    assert (plain[0] - plain[1]).abs().max() > 1e-3


def test_a_language_model_is_left_alone(language) -> None:
    with encode_once(language):
        result = language.run(["a red cat", "a red cat"])
    torch.testing.assert_close(result.output.logits[0], result.output.logits[1])


def test_experiments_encode_once(experiment, seen, tmp_path) -> None:
    experiment(seeds={"count": 4}, batch={"rows": 12}).run(tmp_path / "run")
    assert seen == [2, 1] * 2  # two batches of twelve rows, of two prompts
