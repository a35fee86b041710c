"""Layer by position in a language model, against a loop of plain hooks."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from dreamreader.engine import Reader, Record, RunResult
from dreamreader.errors import InvalidInput
from dreamreader.localise import Cell, grid, patch_edits, patch_grid

CLEAN, CORRUPTED = ["a red cat", "a dog on a red tree"], ["a blue cat", "a cat on a red tree"]
ANSWERS = torch.tensor([[40, 41], [50, 60]])  # (right, wrong) token of each pair


@pytest.fixture(scope="module")
def reader() -> Reader:
    reader = Reader(*tiny.language_model("gpt2"))
    for pair in zip(CLEAN, CORRUPTED, strict=True):
        assert len({len(reader.tokenizer(each).input_ids) for each in pair}) == 1
    return reader


def logit_difference(result: RunResult) -> torch.Tensor:
    last = result.output.logits[:, -1]
    right, wrong = ANSWERS[[row.index for row in result.rows]].unbind(1)
    rows = torch.arange(len(last))
    return last[rows, right] - last[rows, wrong]


def test_a_layer_by_position_grid_is_a_loop_of_plain_hooks(reader: Reader) -> None:
    model = reader.subject
    shortest = min(len(reader.tokenizer(each).input_ids) for each in CLEAN)
    cells = grid(reader, "transformer.h.*", tokens="each", positions=shortest)
    assert len(cells) == 3 * shortest
    found = patch_grid(reader, CLEAN, CORRUPTED, cells, metric=logit_difference, batch_size=3)

    def score(ids: Any, pair: int) -> float:
        with torch.no_grad():
            last = model(ids).logits[0, -1]
        return float(last[ANSWERS[pair, 0]] - last[ANSWERS[pair, 1]])

    for pair, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        given, taking = (
            reader.tokenizer(e, return_tensors="pt").input_ids for e in (clean, corrupted)
        )
        kept: dict[str, torch.Tensor] = {}
        for cell in cells[::shortest]:
            module = model.get_submodule(cell.sites[0])

            def keep(
                module: Any, args: Any, out: Any, name: str = cell.name, kept: Any = kept
            ) -> None:
                kept[name] = (out[0] if isinstance(out, tuple) else out).clone()

            handle = module.register_forward_hook(keep)
            score(given, pair)
            handle.remove()
        assert found.base[pair] == pytest.approx(score(taking, pair), abs=1e-4)
        assert found.goal is not None
        assert found.goal[pair] == pytest.approx(score(given, pair), abs=1e-4)
        for number, cell in enumerate(cells):
            assert isinstance(cell.tokens, int)

            def put(module: Any, args: Any, out: Any, cell: Any = cell, kept: Any = kept) -> Any:
                new = (out[0] if isinstance(out, tuple) else out).clone()
                new[0, cell.tokens] = kept[cell.name][0, cell.tokens]
                return (new, *out[1:]) if isinstance(out, tuple) else new

            handle = model.get_submodule(cell.sites[0]).register_forward_hook(put)
            truth = score(taking, pair)
            handle.remove()
            assert found.values[number, pair] == pytest.approx(truth, abs=1e-4)
    # the last position of the last layer holds all; before the words differ, nothing
    end = grid(reader, "transformer.h.2", tokens=-1)
    whole = patch_grid(reader, CLEAN, CORRUPTED, end, metric=logit_difference)
    assert whole.effects[0].value == pytest.approx(1, abs=1e-3)
    assert found.heat_map().columns == ["all steps"] and len(found.heat_map().rows) == len(cells)
    assert np.abs(found.values[0] - found.base).max() < 1e-5


def test_heads_of_a_language_model(reader: Reader) -> None:
    cells = grid(reader, "transformer.h.*.attn:heads", heads="each", tokens=-1)
    assert len(cells) == 12
    found = patch_grid(reader, CLEAN, CORRUPTED, cells, metric=logit_difference)
    assert (np.abs(found.values - found.base).max(1) > 1e-5).all()


LONGER = "a dog on a red tree"


@pytest.mark.parametrize("direction", ["restore", "corrupt"])
def test_prompts_of_unequal_length_are_patched_token_by_token(reader: Reader, direction) -> None:
    clean, corrupted = [LONGER, "a red cat"], ["a blue cat", "a cat"]
    if direction == "corrupt":  # what gives has the tokens of what takes
        clean, corrupted = corrupted, clean
    cells = grid(reader, "transformer.h.*")
    asked = {"metric": logit_difference, "direction": direction}
    found = patch_grid(reader, clean, corrupted, cells, **asked)
    for pair in range(2):  # alone nothing is padded

        def one(result: RunResult, pair: int = pair) -> torch.Tensor:
            last = result.output.logits[:, -1]
            return last[:, ANSWERS[pair, 0]] - last[:, ANSWERS[pair, 1]]

        alone = patch_grid(
            reader, [clean[pair]], [corrupted[pair]], cells, metric=one, direction=direction
        )
        np.testing.assert_allclose(found.values[:, pair], alone.values[:, 0], rtol=1e-3, atol=1e-4)
        assert np.abs(alone.values - alone.base).max() > 1e-3


def test_tokens_without_a_counterpart_are_refused_by_name(reader: Reader) -> None:
    cells = grid(reader, "transformer.h.*")
    lacking = "pair 1: tokens [0-9]+ .. [0-9]+ of the corrupted prompt 'a cat on a red tree' would"
    with pytest.raises(InvalidInput, match=lacking):
        patch_grid(reader, [CLEAN[0], "a cat"], CORRUPTED, cells, metric=logit_difference)
    chosen = grid(reader, "transformer.h.1", tokens=[0, 1, -1])
    first = patch_grid(reader, [CLEAN[0], "a cat"], CORRUPTED, chosen[:2], metric=logit_difference)
    assert np.isfinite(first.values).all()
    with pytest.raises(InvalidInput, match="tokens [0-9]+ of row 1 are edited, the source has"):
        patch_grid(reader, [CLEAN[0], "a cat"], CORRUPTED, chosen[2:], metric=logit_difference)


def test_a_window_of_generated_steps_keeps_the_tokens_of_its_steps(reader: Reader) -> None:
    site = "transformer.h.1"
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    record = Record(site, steps=slice(1, None))
    plain = reader.run(CLEAN, record=record, **asked)
    edits = patch_edits([Cell("late", site, steps=(2, 4))] * 2, plain.cache)
    found = reader.run(CLEAN, edits=edits, record=record, **asked)
    assert sorted(found.firing[0].steps) == [2, 3]  # with positions of step 1 it would be refused
    assert torch.equal(found.cache[site].tensor, plain.cache[site].tensor)
    assert torch.equal(found.cache[site].positions, plain.cache[site].positions)
