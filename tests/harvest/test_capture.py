"""What is in the store is what the model had: values, keys, and which tokens were chosen."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dreamreader.engine import Reader, Record
from dreamreader.errors import ClockUnknown, InvalidInput, NeverFired
from dreamreader.store import Store
from dreamreader.zoo import settings

from .jobs import LAYER, MIDDLE, PROMPTS, TEXTS, gpt2, pictures, texts, unet

BLOCK = "unet.mid_block"
FIRST = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
SECOND = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2"
Line = dict[str, Any]


def lines(store: Store, site: str) -> list[tuple[Line, Tensor]]:
    """Every row of a site with its coordinates."""
    rows = store.read(site)
    return list(zip(rows.keys.to_pylist(), rows.values, strict=True))


def recorded(site: str, **kw: Any) -> Any:
    """What plain recordings of the batches of `pictures` give, by sample."""
    found = {}
    for start, stop in ((0, 3), (3, 4), (4, 6)):  # batches of three in units of four
        prompts = [PROMPTS[n // 2] for n in range(start, stop)]
        seeds = [n % 2 for n in range(start, stop)]
        arguments = {**settings(num_inference_steps=2), "output_type": "latent"}
        run = unet().run(prompts, record=Record(site, **kw), seeds=seeds, **arguments)
        for row in range(stop - start):
            found[start + row] = run.cache[site].select(rows=[row])
    return found


@pytest.mark.parametrize(
    ("site", "dtype"),
    [(MIDDLE, "bfloat16"), (f"{MIDDLE}:heads", "model"), (f"{BLOCK}:delta", "float16")],
)
def test_pictures_are_stored_as_they_are_recorded(tmp_path: Path, site: str, dtype: str) -> None:
    store = pictures(capture=[{"sites": site, "dtype": dtype}]).run(tmp_path / "s")
    found, expected = lines(store, site), recorded(site)
    tokens = expected[0].tensor.shape[3]
    assert len(found) == 6 * 2 * 2 * tokens
    seen = set()
    for key, value in found:
        sample = PROMPTS.index(key["prompt"]) * 2 + key["seed"]
        one = expected[sample]
        at = one.branches.index(key["branch"]), key["step"], key["token"]
        kept = one.tensor[0, at[0], at[1], at[2]].flatten()
        assert torch.equal(value, kept.to(value.dtype))
        assert key["timestep"] == one.steps[key["step"]].timestep
        assert key["sigma"] == one.steps[key["step"]].sigma
        assert key["id"] == str(sample // 2)
        seen.add((sample, *at))
    assert len(seen) == len(found)
    assert store.sites[site].width == found[0][1].numel()


def test_texts_are_stored_without_their_padding(tmp_path: Path) -> None:
    store = texts().run(tmp_path / "s")
    found = lines(store, LAYER)
    for first, prompts in ((0, TEXTS[:2]), (2, TEXTS[2:3]), (3, TEXTS[3:])):
        values = gpt2().run(prompts, record=LAYER).cache[LAYER].tensor[:, 0]
        for row, prompt in enumerate(prompts):
            length = len(gpt2().tokenizer(prompt).input_ids)
            own = [(key, value) for key, value in found if key["prompt"] == prompt]
            assert [key["token"] for key, _ in own] == list(range(length))
            assert torch.equal(torch.stack([value for _, value in own]), values[row, -length:])
            assert {(key["id"], key["step"]) for key, _ in own} == {(str(first + row), 0)}
    assert store.rows == sum(len(gpt2().tokenizer(each).input_ids) for each in TEXTS)


def test_generated_tokens_are_stored_at_their_positions(tmp_path: Path) -> None:
    made = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    changes = {"pipeline": made, "data": {"prompts": TEXTS[:2]}, "batch": {}}
    store = texts(**changes).run(tmp_path / "s")
    for prompt in TEXTS[:2]:
        length = len(gpt2().tokenizer(prompt).input_ids)
        own = [key for key, _ in lines(store, LAYER) if key["prompt"] == prompt]
        assert [key["token"] for key in own] == list(range(length + 3))
        assert [key["step"] for key in own] == [0] * length + [1, 2, 3]


def test_a_text_that_ended_has_no_rows_of_what_comes_after(tmp_path: Path) -> None:
    model, tokenizer = gpt2().subject, gpt2().tokenizer
    writes = {"max_new_tokens": 6, "do_sample": False}
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    written = model.generate(ids, **writes, pad_token_id=0)[0].tolist()
    made = {
        **writes,
        "eos_token_id": written[ids.shape[1] + 2],
    }  # ends with the third at the latest
    changes = {"pipeline": made, "data": {"prompts": TEXTS[:2]}, "batch": {}}
    found = lines(texts(**changes).run(tmp_path / "s"), LAYER)
    for prompt in TEXTS[:2]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        length = model.generate(ids, **made, pad_token_id=0).shape[1]
        # what is written last is not read any more
        assert [k["token"] for k, _ in found if k["prompt"] == prompt] == list(range(length - 1))
    with pytest.raises(
        InvalidInput, match="batch.rows: 2 texts that are generated end at differen"
    ):
        texts(pipeline=made).plan()


def test_logits_are_of_all_tokens_only_where_the_head_is_captured(tmp_path: Path) -> None:
    seen = []

    def note(module: Any, args: Any, output: Any) -> None:
        seen.append(output.shape[1])

    handle = gpt2().subject.lm_head.register_forward_hook(note)
    try:
        texts().run(tmp_path / "s")
        assert set(seen) == {1}
        head = texts(capture=[{"sites": "lm_head"}]).run(tmp_path / "t")
    finally:
        handle.remove()
    assert head.rows == sum(len(gpt2().tokenizer(each).input_ids) for each in TEXTS)


def test_sites_of_several_widths_steps_and_dtypes_in_one_pass(tmp_path: Path) -> None:
    capture = [
        {"sites": "unet.**.attn1", "steps": 1, "branch": "cond", "dtype": "int8"},
        {"sites": ["unet.mid_block", "text_encoder.encoder.layers.*"], "dtype": "float16"},
    ]
    store = pictures(capture=capture).run(tmp_path / "s")
    assert len(store.sites) > 8
    assert len({(each.width, each.stored) for each in store.sites.values()}) >= 3
    key = store.read(f"{MIDDLE[:-1]}1").keys
    assert set(key["step"].to_pylist()) == {1} and set(key["branch"].to_pylist()) == {"cond"}
    encoder = store.read("text_encoder.encoder.layers.0").keys
    assert set(encoder["step"].to_pylist()) == {-1} and set(encoder["seed"].to_pylist()) == {0, 1}
    assert str(encoder["sigma"][0]) == "nan"


def chosen(store: Store, site: str) -> dict[tuple[Any, ...], list[int]]:
    """Tokens kept, by prompt, seed, step and branch."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for key, _ in lines(store, site):
        which = (key["prompt"], key["seed"], key["step"], key["branch"])
        found.setdefault(which, []).append(key["token"])
    return found


def harvested(path: Path, tokens: Any, **changes: Any) -> Store:
    sites: Sequence[str] = [FIRST, SECOND]  # with equally many tokens
    capture = [{"sites": sites, "tokens": tokens}]
    return pictures(capture=capture, **changes).run(path)


def test_random_tokens_are_those_of_the_sample_whatever_is_around_it(tmp_path: Path) -> None:
    one = harvested(tmp_path / "a", {"random": 0.25})
    other = harvested(tmp_path / "b", {"random": 0.25}, batch={"rows": 2}, store={"unit": 5})
    found = chosen(one, SECOND)
    count = len(chosen(harvested(tmp_path / "e", "all"), SECOND)["a red circle", 0, 0, "cond"]) // 4
    assert len(found) == 6 * 2 * 2 and {len(each) for each in found.values()} == {count}
    assert all(each == sorted(set(each)) for each in found.values())
    assert len({tuple(each) for each in found.values()}) == len(found)
    assert found == chosen(one, FIRST) == chosen(other, SECOND)
    again = chosen(harvested(tmp_path / "c", {"random": count}), SECOND)
    assert again == found
    assert chosen(harvested(tmp_path / "d", {"random": count}, token_seed=1), SECOND) != found


def test_a_budget_is_kept_to_the_row(tmp_path: Path) -> None:
    found = chosen(harvested(tmp_path / "s", {"budget": 7}), SECOND)
    sums: dict[Any, int] = {}
    for (prompt, seed, _, branch), tokens in found.items():
        sums[prompt, seed, branch] = sums.get((prompt, seed, branch), 0) + len(tokens)
    assert len(sums) == 12 and set(sums.values()) == {7}
    assert {len(each) for each in found.values()} == {3, 4}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"every": 5}, lambda n, hw: list(range(0, n, 5))),
        ([0, 3, -1], lambda n, hw: [0, 3, n - 1]),
        (2, lambda n, hw: [2]),
        ({"box": [0, 0, 1, 0.5]}, lambda n, hw: list(range(n // 2))),
    ],
    ids=["every", "list", "one", "box"],
)
def test_chosen_tokens(tmp_path: Path, tokens: Any, expected: Any) -> None:
    store = harvested(tmp_path / "s", tokens)
    hw = store.sites[SECOND].hw
    assert hw is not None
    for each in chosen(store, SECOND).values():
        assert each == expected(hw[0] * hw[1], hw)


def test_a_word_of_the_text(tmp_path: Path) -> None:
    capture = [{"sites": LAYER, "tokens": "dog"}]
    store = texts(capture=capture, data={"prompts": [TEXTS[1]]}).run(tmp_path / "s")
    ids = gpt2().tokenizer(TEXTS[1]).input_ids
    kept = [ids[key["token"]] for key, _ in lines(store, LAYER)]
    assert gpt2().tokenizer.decode(kept).strip() == "dog"


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("tokens", ["all", {"random": 3}], ids=str)
def test_pooled_tokens(tmp_path: Path, pool: str, tokens: Any) -> None:
    capture = [{"sites": LAYER, "tokens": tokens, "dtype": "float32", "pool": pool}]
    found = lines(texts(capture=capture).run(tmp_path / "a"), LAYER)
    plain = [{"sites": LAYER, "tokens": tokens, "dtype": "float32"}]
    rows = lines(texts(capture=plain).run(tmp_path / "b"), LAYER)
    assert [key["prompt"] for key, _ in found] == TEXTS
    for key, value in found:
        own = torch.stack([v for k, v in rows if k["prompt"] == key["prompt"]])
        expected = own.mean(0) if pool == "mean" else own.amax(0)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert key["token"] == -1


class Unlisted(diffusers.StableDiffusionPipeline):
    """A pipeline with a loop of its own, whose guidance is not known."""

    @functools.wraps(diffusers.StableDiffusionPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def test_an_unknown_clock_is_an_error_before_the_first_row(tmp_path: Path) -> None:
    subject = unet().subject
    components = {**subject.components, "safety_checker": None, "feature_extractor": None}
    pipe = Unlisted(**(components | {"image_encoder": None}), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    alone = {"num_inference_steps": 2, "guidance_scale": 1.0}
    found = pictures(reader=Reader(pipe), pipeline=alone).run(tmp_path / "s")
    assert found.branches == ["cond"]  # its embeddings are all those of the prompt
    with pytest.raises(ClockUnknown, match=f"{MIDDLE}: streaming needs the branch.*Unlisted"):
        pictures(reader=Reader(pipe)).run(tmp_path / "t")
    assert not list((tmp_path / "t" / "shards").iterdir())


def test_captures_that_cannot_be_right(tmp_path: Path) -> None:
    twice = [{"sites": "unet.**.attn2"}, {"sites": [BLOCK, MIDDLE]}]
    with pytest.raises(InvalidInput, match=rf"capture.1.sites: {MIDDLE} is in capture.0 too"):
        pictures(capture=twice).plan()
    with pytest.raises(NeverFired, match="steps"):
        pictures(capture=[{"sites": MIDDLE, "steps": 7}]).run(tmp_path / "s")
    made = {"max_new_tokens": 2, "do_sample": False}
    budget = [{"sites": LAYER, "tokens": {"budget": 4}}]
    with pytest.raises(InvalidInput, match="budget of tokens needs to know how many steps come"):
        texts(capture=budget, pipeline=made).plan()
    lengths = [len(gpt2().tokenizer(each).input_ids) for each in TEXTS]
    assert texts(capture=budget).run(tmp_path / "t").rows == sum(min(4, n) for n in lengths)
