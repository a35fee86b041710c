"""Labelled recordings: one mean over tokens, the labels of the rows."""

from functools import cache

import pytest
import tiny
import torch

from dreamreader.engine import Reader, Record
from dreamreader.errors import InvalidInput
from dreamreader.recording import joined_rows, record_batches, record_labelled
from dreamreader.recording.labelled import evenly

LAYER = "model.layers.1"
PROMPTS = ["a red cat", "a blue house on a tree", "the red dog"]
LABELS = ["red", "blue", "red"]


@cache
def language() -> Reader:
    return Reader(*tiny.language_model("llama"))


def test_the_mean_is_over_the_rows_own_tokens_by_hooks() -> None:
    found = record_labelled(language(), PROMPTS, LABELS, LAYER)
    whole = record_labelled(language(), PROMPTS, LABELS, LAYER, pool=None)
    assert whole.cache[LAYER].positions is not None
    kept: list[torch.Tensor] = []
    module = language().subject.get_submodule(LAYER)
    handle = module.register_forward_hook(
        lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        for each in PROMPTS:
            language().subject(torch.tensor([language().tokenizer(each).input_ids]))
    handle.remove()
    wanted = torch.stack([each[0].mean(0) for each in kept])
    for each in (found, whole):
        means = each.means(LAYER)[:, 0].float()
        torch.testing.assert_close(means, wanted, rtol=1e-4, atol=1e-5)
    assert [row.prompt for row in found.of("red")[LAYER].rows] == [PROMPTS[0], PROMPTS[2]]


def test_in_a_pipeline_the_branch_is_that_of_the_prompt() -> None:
    reader, site = Reader(tiny.pipeline("sd")), "unet.mid_block"
    asked = {"seeds": [3, 4], **tiny.arguments("sd", 2)}
    found = record_labelled(reader, PROMPTS[:2], LABELS[:2], site, output_type="latent", **asked)
    record = Record(site, branch="cond")
    cache = reader.run(PROMPTS[:2], record=record, output_type="latent", **asked).cache
    wanted = cache[site].tensor.float().mean(2, keepdim=True)
    torch.testing.assert_close(found.cache[site].tensor, wanted, rtol=1e-5, atol=1e-6)
    assert found.cache[site].branches == ("cond",)


def test_batches_are_joined_along_the_rows() -> None:
    drawn: list[tuple[list[str], list[int]]] = []

    def draw(prompts, seeds, records):
        drawn.append((prompts, seeds))
        return language().run(prompts, record=records, seeds=seeds).cache

    rows = [(prompt, 7 + n) for n, prompt in enumerate(PROMPTS)]
    records = [Record(LAYER, tokens=-1)]
    found = joined_rows(record_batches(draw, rows, records, 2))[LAYER]
    assert drawn == [(PROMPTS[:2], [7, 8]), (PROMPTS[2:], [9])]
    for row, prompt in enumerate(PROMPTS):
        wanted = language().run(prompt, record=records).cache[LAYER].tensor[0]
        torch.testing.assert_close(found.tensor[row], wanted, rtol=1e-4, atol=1e-5)
    assert [evenly(n, 4) for n in (4, 9)] == [[(0, 4)], [(0, 3), (3, 6), (6, 9)]]


def test_wrong_labels_say_what_is_wrong() -> None:
    with pytest.raises(InvalidInput, match="2 labels for 3 rows"):
        record_labelled(language(), PROMPTS, LABELS[:2], LAYER)
    with pytest.raises(InvalidInput, match="pool is 'mean' or None, got 'max'"):
        record_labelled(language(), PROMPTS, LABELS, LAYER, pool="max")
    with pytest.raises(InvalidInput, match="no row has the label 'green'; the labels are 'red', "):
        record_labelled(language(), PROMPTS, LABELS, LAYER).of("green")
