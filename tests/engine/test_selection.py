"""Selections: every spelling of one means the same, what is ambiguous or empty is refused."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from dreamreader.edits import Box, Scale, Steer
from dreamreader.engine import Reader, Record
from dreamreader.engine._selection import (
    in_steps,
    mask_of,
    normalized,
    normalized_steps,
    normalized_values,
    numbers_of,
)
from dreamreader.engine._stream import Stream
from dreamreader.engine._watch import Watch
from dreamreader.errors import InvalidInput, NeverFired

LAYER, HEADS = "transformer.h.1", "transformer.h.1.attn:heads"
PROMPTS = ["a red cat", "a red dog"]
WIDTH, TOKENS = 32, 3


def spellings(indices: list[int], count: int) -> Iterator[Any]:
    """Ways to write one selection of some of `count` entries."""
    yield list(indices)
    yield tuple(indices)
    yield set(indices)
    yield frozenset(indices)
    yield dict.fromkeys(indices).keys()
    yield iter(indices)
    yield [each - count for each in indices]
    yield [np.int64(each) for each in indices]
    yield [torch.tensor(each) for each in indices]
    for kind in (np.int8, np.int32, np.uint16, np.int64, np.dtype(">i4"), object):
        yield np.array(indices, kind)
    for dtype in (torch.int8, torch.int32, torch.int64):
        yield torch.tensor(indices, dtype=dtype)
    chosen = [each in indices for each in range(count)]
    yield chosen
    yield tuple(chosen)
    yield np.array(chosen)
    yield torch.tensor(chosen)
    yield [np.bool_(each) for each in chosen]
    if len(indices) == 1:
        yield indices[0]
        yield np.int32(indices[0])
        yield np.array(indices[0])
        yield torch.tensor(indices[0])
        yield indices[0] - count
    steps = set(np.diff(indices).tolist()) or {1}
    if len(steps) == 1 and min(steps) > 0:
        every = range(indices[0], indices[-1] + 1, min(steps))
        yield every
        yield every[::-1]
        yield slice(every.start, every.stop, every.step)
        yield slice(np.int64(every.start), torch.tensor(every.stop), every.step)
    if indices == list(range(count)):
        yield slice(None)


def selections(count: int, seed: int) -> list[list[int]]:
    """Random ascending indices, and the edges; those that look like a mask are left out."""
    drawn = random.Random(seed)
    some = [sorted(drawn.sample(range(count), drawn.randint(1, count))) for _ in range(20)]
    return [[0], [count - 1], list(range(count)), *some]


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_every_spelling_selects_the_same(count: int) -> None:
    seen = 0
    for indices in selections(count, count):
        wanted = [each in indices for each in range(count)]
        for chosen in spellings(indices, count):
            form = normalized(chosen, "rows")
            assert mask_of(form, count, "rows").tolist() == wanted, chosen
            assert sorted(numbers_of(form, count, "rows")) == indices, chosen
            steps = normalized_steps(form, "steps")
            assert [in_steps(steps, each, count) for each in range(count)] == wanted, chosen
            seen += 1
    assert seen > 23 * 20


def test_strengths_of_0_and_1_are_a_mask_for_tokens() -> None:
    for chosen in ([0.0, 1.0, 0.5], np.array([0, 1, 0.5]), torch.tensor([0, 1, 0.5])):
        form = normalized(chosen, "tokens", soft=True)
        assert mask_of(form, 3, "tokens").tolist() == [0, 1, 0.5]
        with pytest.raises(InvalidInput, match="rows"):
            normalized(chosen, "rows")


def test_no_indices_are_no_indices_whatever_holds_them() -> None:
    for chosen in ([], (), set(), np.array([]), torch.tensor([]), range(0), slice(0, 0)):
        assert not mask_of(normalized(chosen, "rows"), 3, "rows").any()
        assert not mask_of(normalized(chosen, "tokens", soft=True), 3, "tokens").any()


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ([0, 1, 1], r"\[0, 1, 1\] could be indices or a mask; give truth values"),
        (np.array([1, 0, 1]), "could be indices or a mask"),
        (torch.tensor([1, 1, 1]), "could be indices or a mask"),
        (torch.tensor([0, 2], dtype=torch.uint8), "uint8 could be indices or a mask"),
        ([True, 1], "could be indices or a mask"),
        ([True, 0.5], "could be indices or a mask"),
        ({True, False}, "could be indices or a mask"),
        (True, "an index, slice, range, list or set of indices, mask"),
        (np.True_, "an index, slice"),
        (torch.tensor(True), "one truth value selects nothing"),
        (1.0, "an index, slice"),
        (np.float32(1), "an index, slice|whole numbers"),
        (torch.tensor(1.0), "whole numbers or truth values are needed"),
        (torch.tensor([1j]), "whole numbers or truth values are needed"),
        (torch.tensor([[1, 2]]), r"indices are one list of whole numbers, got \[1, 2\]"),
        ([[0, 1], [2]], "an index, slice"),
        ({0: True}, r"an index, slice.*got \{0: True\}"),
        (b"red", "an index, slice"),
        (["red", 1], "an index, slice"),
        (["red", ""], "a word of the prompt is needed, got ''"),
        ("  ", "a word of the prompt is needed, got '  '"),
        (object(), "an index, slice"),
        (slice(0, 5, 0), r"the step of a slice is not 0"),
        (slice(0.5, 2), "a slice has whole numbers, got 0.5"),
        (slice("a"), "a slice has whole numbers, got 'a'"),
        ([0.5, 1.5], "strengths from 0 to 1, got 0.5 to 1.5"),
        (torch.tensor([-0.5, 1]), "strengths from 0 to 1, got -0.5 to 1"),
        (torch.tensor([0.5, float("nan")]), "not finite"),
    ],
)
def test_what_could_mean_two_things_is_refused(chosen: Any, text: str) -> None:
    with pytest.raises(InvalidInput, match=f"(?s)tokens: .*({text})"):
        normalized(chosen, "tokens", soft=True, words=True)


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ((3, 1), r"a pair is \(low, high\), got \(3, 1\)"),
        (float("nan"), "nan is no number"),
        ([0.5, float("nan")], "nan is no number"),
        (slice(0, 1, 0.1), "a slice of values has no step"),
        ("a", "must be a number, slice, range, set or predicate, got 'a'"),
        (True, "must be a number"),
        (np.array([True, False]), "must be a number"),
    ],
)
def test_values_that_select_nothing_are_refused(chosen: Any, text: str) -> None:
    with pytest.raises(InvalidInput, match=f"sigmas.*{text}"):
        normalized_values(chosen, "sigmas")


def test_a_long_range_costs_nothing() -> None:
    everything = normalized(range(10**12), "steps")
    assert in_steps(everything, 3, 10) and in_steps(everything, 3, None)
    assert in_steps(range(-(10**12), 0), 3, 10)
    with pytest.raises(InvalidInput, match="999999999999 asked for, there are 3"):
        mask_of(everything, 3, "rows")


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(*tiny.language_model("gpt2"))


def change(reader: Reader, edit: Any, site: str = LAYER) -> torch.Tensor:
    """What an edit adds to [rows, tokens, features]."""
    before = reader.run(PROMPTS, record=site).cache[site].tensor
    after = reader.run(PROMPTS, edits=edit, record=site).cache[site].tensor
    return (after - before)[:, 0].flatten(2)


@pytest.mark.parametrize("name", ["rows", "tokens", "channels", "heads"])
def test_every_spelling_edits_and_records_the_same(reader: Reader, name: str) -> None:
    count = {"rows": 2, "tokens": TOKENS, "channels": WIDTH, "heads": 4}[name]
    site = HEADS if name == "heads" else LAYER
    indices = {"rows": [1], "tokens": [0, 2], "channels": [3, 9, 15], "heads": [1, 3]}[name]
    wanted = torch.zeros(2, TOKENS, WIDTH)
    for each in indices:
        if name == "heads":
            wanted.unflatten(-1, (4, -1))[:, :, each] = 1
        else:
            wanted.select(("rows", "tokens", "channels").index(name), each)[:] = 1
    ones = torch.ones(WIDTH)
    for chosen in spellings(indices, count):
        kept = list(chosen) if isinstance(chosen, Iterator) else chosen
        moved = change(reader, Steer(site, ones, 1.0, **{name: kept}), site)
        torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-5)
        assert torch.equal(moved == 0, wanted == 0), chosen
        if name in ("rows", "tokens"):
            got = reader.run(PROMPTS, record=Record(LAYER, **{name: kept})).cache[LAYER].tensor
            whole = reader.run(PROMPTS, record=LAYER).cache[LAYER].tensor
            axis = 0 if name == "rows" else 2
            assert torch.equal(got, whole.index_select(axis, torch.tensor(indices))), chosen


def test_a_word_is_its_tokens_in_every_spelling(reader: Reader) -> None:
    for chosen in ("red", ["red"], ("red",), {"red"}, np.array(["red"]), np.array("red"), 1):
        moved = change(reader, Steer(LAYER, torch.ones(WIDTH), 1.0, tokens=chosen))
        assert (moved != 0).any(-1).tolist() == [[False, True, False]] * 2


EMPTY = [
    {"rows": []},
    {"rows": slice(5, 9)},
    {"rows": np.array([])},
    {"rows": [False, False]},
    {"tokens": set()},
    {"tokens": 50},
    {"tokens": range(50, 60)},
    {"tokens": [0.0, 0.0, 0.0]},
    {"rows": 1, "tokens": [False, False, False]},
    {"steps": 5},
    {"branch": ()},
]


@pytest.mark.parametrize("chosen", EMPTY, ids=str)
def test_what_matches_nothing_never_fired(reader: Reader, chosen: dict[str, Any]) -> None:
    with pytest.raises(NeverFired, match="Record.* never fired"):
        reader.run(PROMPTS, record=Record(LAYER, **chosen))
    with pytest.raises(NeverFired, match="Steer.* never fired"):
        reader.run(PROMPTS, edits=Steer(LAYER, torch.ones(WIDTH), 1.0, **chosen))
    with pytest.raises(NeverFired, match="Stream.* never fired"):
        reader.run(PROMPTS, record=Stream(LAYER, lambda flowing: None, **chosen))
    if "tokens" not in chosen:
        watch = Watch("transformer.h.1.attn:probs", lambda attention, call: None, **chosen)
        with pytest.raises(NeverFired, match="Watch.* never fired"):
            reader.run(PROMPTS, record=watch)


def test_masks_are_named_by_their_size(reader: Reader) -> None:
    with pytest.raises(NeverFired, match=r"rows=mask \[2\] matched no element of the \[2, 3, 32\]"):
        reader.run(PROMPTS, record=Record(LAYER, rows=torch.zeros(2, dtype=torch.bool)))
    with pytest.raises(
        InvalidInput, match=r"heads=mask \[4\] selects none of the 32 channels in 4 heads"
    ):
        reader.run(PROMPTS, edits=Scale(HEADS, 2.0, heads=[False] * 4))
    with pytest.raises(InvalidInput, match=r"channels=\[\] selects none of the 32 channels"):
        reader.run(PROMPTS, edits=Scale(LAYER, 2.0, channels=[]))


UNEQUAL = ["a cat", "a red dog on a tree"]


def test_what_other_rows_lack_does_not_matter(reader: Reader) -> None:
    for chosen, place in (("dog", 2), (-5, 1), (["red", "dog"], None)):
        found = reader.run(UNEQUAL, record=Record(LAYER, tokens=chosen, rows=[1])).cache[LAYER]
        alone = reader.run(UNEQUAL[1], record=Record(LAYER, tokens=chosen)).cache[LAYER]
        torch.testing.assert_close(found.tensor, alone.tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.positions, alone.positions)
        assert place is None or found.positions.tolist() == [[[place]]]
        edit = Steer(LAYER, torch.ones(WIDTH), 1.0, tokens=chosen, rows=1)
        assert reader.run(UNEQUAL, edits=edit).firing[0].rows == {1}
    with pytest.raises(InvalidInput, match="the word 'dog' is not in the prompt of row 0: 'a cat'"):
        reader.run(UNEQUAL, record=Record(LAYER, tokens="dog", rows=[0, 1]))
    with pytest.raises(InvalidInput, match="tokens=-5, row 0 has 2 tokens"):
        reader.run(UNEQUAL, record=Record(LAYER, tokens=-5))


def test_a_word_is_the_same_tokens_of_a_padded_prompt_that_goes_on(reader: Reader) -> None:
    prompts, record = ["a cat", "a red dog on a cat"], Record(LAYER, tokens="cat", steps=0)
    written = reader.run(prompts, record=record, max_new_tokens=2, do_sample=False).cache[LAYER]
    alone = [reader.run(each, record=Record(LAYER, tokens="cat")).cache[LAYER] for each in prompts]
    assert torch.equal(written.positions, torch.cat([each.positions for each in alone]))
    expected = torch.cat([each.tensor for each in alone])
    torch.testing.assert_close(written.tensor, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chosen", [slice(1, None), slice(0, -1), slice(-3, None), range(0, 3)])
def test_slices_of_unequal_prompts_are_padded_in_front(reader: Reader, chosen: Any) -> None:
    record = Record(LAYER, tokens=chosen)
    found = reader.run(UNEQUAL, record=record).cache[LAYER]
    batched = reader.run(UNEQUAL, record=record, batch_size=1).cache[LAYER]
    assert torch.equal(found.positions, batched.positions)
    torch.testing.assert_close(found.tensor, batched.tensor, rtol=1e-4, atol=1e-5)
    for row, prompt in enumerate(UNEQUAL):
        alone = reader.run(prompt, record=record).cache[LAYER]
        real = found.positions[row, 0] >= 0
        assert found.positions[row, 0, real].tolist() == alone.positions[0, 0].tolist()
        assert real.tolist() == sorted(real.tolist())  # padding is in front
        torch.testing.assert_close(
            found.tensor[row, 0, real], alone.tensor[0, 0], rtol=1e-4, atol=1e-5
        )
        assert not found.tensor[row, 0, ~real].any()


def test_a_mean_over_a_slice_of_unequal_prompts_leaves_padding_out(reader: Reader) -> None:
    mean = Record(LAYER, tokens=slice(1, None), reduce=lambda x: x.mean(1, keepdim=True))
    both = reader.run(UNEQUAL, record=mean).cache[LAYER].tensor
    alone = [reader.run(each, record=mean).cache[LAYER].tensor for each in UNEQUAL]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_row_without_any_of_the_tokens_is_refused(reader: Reader) -> None:
    with pytest.raises(InvalidInput, match=r"different numbers of tokens \(0, 2\)"):
        reader.run(UNEQUAL, record=Record(LAYER, tokens=slice(4, None)))


def test_a_layout_at_a_port_of_an_attention_is_refused() -> None:
    for port in ("q", "k", "v", "heads", "probs"):
        with pytest.raises(InvalidInput, match=rf"layout='rows tokens features' .* at a.b:{port}"):
            Record(f"a.b:{port}", layout="rows tokens features")
    for port in ("out", "in", "delta"):
        assert Record(f"a.b:{port}", layout="rows tokens features").layout is not None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"site": 5}, "Record: site: a site such as .* is needed, or several, got 5"),
        ({"site": ["a", 5]}, "got 5"),
        ({"site": None}, "got None"),
        ({"branch": 5}, "Record: branch: a name such as 'cond' is needed, or several, got 5"),
        ({"branch": ["cond", 5]}, "got 5"),
        ({"dtype": "float32"}, "a floating point type such as torch.float32, got 'float32'"),
        ({"dtype": torch.int8}, "a floating point type such as torch.float32, got torch.int8"),
        ({"device": "nonsense"}, "device 'nonsense' is none of torch"),
        ({"reduce": 5}, "reduce must be a function, got int"),
        ({"steps": "a"}, "Record: steps must be a number, slice, range, set or predicate"),
    ],
)
def test_other_arguments_of_a_record_are_checked(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        Record(**{"site": "a", **arguments})


def test_a_box_needs_numbers() -> None:
    for corners in (("a", 0, 1, 1), (float("nan"), 0, 1, 1), (True, 0, 1, 1)):
        with pytest.raises(InvalidInput, match="Box: left"):
            Box(*corners)


@pytest.mark.parametrize("steps", [range(1, 0), slice(1, 0)])
def test_a_window_that_is_empty_is_no_schedule_that_is_empty_on_purpose(steps: Any) -> None:
    reader = Reader(tiny.pipeline("sd"))
    edit = Scale("unet.mid_block", 0.5, steps=steps)
    with pytest.raises(NeverFired):
        reader.run("a red circle", edits=edit, seeds=0, num_inference_steps=2)


def test_the_grids_of_a_unet_round_up_where_a_side_is_odd() -> None:
    pipe = tiny.pipeline("sd")
    middle = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    outer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    latents = torch.randn(1, 4, 9, 13)
    with Reader(pipe).recording([outer, middle]) as cache:
        pipe("a red cat", latents=latents, output_type="latent", **tiny.arguments("sd", 1))
    for site, grid in ((outer, (9, 13)), (middle, (5, 7))):
        assert cache[site].hw == grid and cache[site].tensor.shape[-2] == grid[0] * grid[1]
