"""Pairs of two models: equal to hand-made hooks; what cannot be aligned is refused."""

from functools import cache
from typing import Any

import pytest
import tiny
import torch
from tiny import text, tokenizers
from tiny.unets import stable_diffusion_xl
from torch import Tensor

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.recording import Pairs, record_between, resample_grid
from dreamreader.recording.alignment import align_spans
from dreamreader.reft import ActivationMatch

TEXTS = ["a red cat on a tree", "the blue house, well-known", " don't  love  dogs"]
SOURCE, TARGET = "transformer.h.1", "model.layers.1"
UNET = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"


@cache
def small() -> Reader:
    """A GPT-2 with 24 features whose byte pairs are trained on other sentences."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tokenizers.byte_level()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=24, n_layer=2, n_head=2, n_positions=128,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    return Reader(GPT2LMHeadModel(config).eval(), tokenizer)


@cache
def large() -> Reader:
    return Reader(*tiny.language_model("gemma2"))


@cache
def unet() -> Reader:
    return Reader(tiny.pipeline("sd"))


@cache
def wide() -> Reader:
    pipe = stable_diffusion_xl(widths=(16, 24))
    pipe.vae = unet().subject.vae  # whose latents both denoisers can share
    pipe.set_progress_bar_config(disable=True)
    return Reader(pipe)


def hooked(reader: Reader, site: str, prompt: str) -> Tensor:
    """[tokens, features] of one prompt by itself, without padding."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)

    handle = reader.subject.get_submodule(site).register_forward_hook(keep)
    with torch.no_grad():
        reader.subject(torch.tensor([reader.tokenizer(prompt).input_ids]))
    handle.remove()
    return kept[0][0]


def cut(readers: tuple[Reader, Reader], prompt: str) -> list[tuple[list[int], list[int]]]:
    """Pieces of a text between places where both tokenizers begin a token, letter by letter."""
    letters = [n for n, each in enumerate(prompt) if not each.isspace()]
    owners: list[list[int]] = []
    for reader in readers:
        spans = reader.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        owners.append([next(t for t, (a, b) in enumerate(spans) if a <= n < b) for n in letters])
    pieces: list[tuple[list[int], list[int]]] = [([], [])]
    for at in range(len(letters)):
        if at and all(own[at] != own[at - 1] for own in owners):
            pieces.append(([], []))
        for side, own in zip(pieces[-1], owners, strict=True):
            if own[at] not in side:
                side.append(own[at])
    return pieces


@pytest.mark.parametrize("span", ["last", "mean"])
def test_spans_of_two_tokenizers_are_those_of_hand_made_hooks(span: str) -> None:
    found = record_between(
        small(), large(), TEXTS, SOURCE, [TARGET, "model.layers.2"], align="spans", span=span,
        batch_size=2,
    )  # fmt: skip
    assert found.positions is not None and found.counts is not None and found.steps is None
    assert found.source[SOURCE].shape[3] == 24 and found.target[TARGET].shape[3] == 32
    own = [sum(len(r.tokenizer(text).input_ids) for text in TEXTS) for r in (small(), large())]
    pieces = [each for text in TEXTS for each in cut((small(), large()), text)]
    paired = [sum(len(each[side]) for each in pieces) for side in (0, 1)]
    assert list(found.unpaired.values()) == [own[0] - paired[0], own[1] - paired[1]]
    assert found.unpaired["target tokens"] >= 3  # the beginnings of the texts
    several = 0
    for row, prompt in enumerate(TEXTS):
        pieces = cut((small(), large()), prompt)
        several += sum(len(each[0]) != len(each[1]) for each in pieces)
        count = int(found.counts[SOURCE][row])
        assert count == len(pieces)
        for side, (reader, site, got) in enumerate(
            ((small(), SOURCE, found.source), (large(), TARGET, found.target))
        ):
            values = hooked(reader, site, prompt)
            take = [each[side] for each in pieces]
            wanted = [values[each[-1]] if span == "last" else values[each].mean(0) for each in take]
            torch.testing.assert_close(
                got[site][row, 0, :count], torch.stack(wanted), rtol=1e-4, atol=1e-5
            )
            assert not got[site][row, 0, count:].any()
            places = found.positions[side][row].tolist()
            assert places == [each[-1] for each in take] + [-1] * (len(places) - count)
    assert several > 2  # the tokenizers do cut differently
    assert found.token_weights(SOURCE, torch.arange(3)).sum(1).tolist() == pytest.approx([1] * 3)


def test_tokens_of_one_number_need_texts_that_are_cut_alike() -> None:
    same = record_between(large(), large(), TEXTS, TARGET, "model.layers.2")
    assert same.counts is not None
    for row, prompt in enumerate(TEXTS):
        count = int(same.counts[TARGET][row])
        for site, got in ((TARGET, same.source), ("model.layers.2", same.target)):
            wanted = hooked(large(), site, prompt)
            assert count == len(wanted)
            torch.testing.assert_close(got[site][row, 0, :count], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInput, match=r"row 0: token 2 of 'a red cat.* choose align='spans'"):
        record_between(small(), large(), TEXTS, SOURCE, TARGET)
    with pytest.raises(
        InvalidInput, match="row 0: .*different texts and the models have different"
    ):
        record_between(small(), large(), TEXTS, SOURCE, TARGET, target_prompts=TEXTS[::-1])
    longer = ["the red cat sat here with a dog on the tree"] * 3
    found = record_between(large(), large(), TEXTS, TARGET, TARGET, target_prompts=longer[:3])
    assert found.counts is not None
    count = int(found.counts[TARGET][0])
    wanted = hooked(large(), TARGET, longer[0])[:count]
    torch.testing.assert_close(found.target[TARGET][0, 0, :count], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInput, match="token 3 of .* has no partner: 'a dog' has 3"):
        record_between(large(), large(), longer[:1], TARGET, TARGET, target_prompts=["a dog"])
    with pytest.raises(InvalidInput, match="are different texts, whose characters"):
        record_between(
            large(), large(), TEXTS[:1], TARGET, TARGET, target_prompts=["a dog"], align="spans"
        )


@pytest.mark.parametrize("align", ["spans", "index"])
def test_the_first_pairs_of_a_text_can_be_left_out(align: str) -> None:
    asked: dict[str, Any] = {"align": align, "progress": False}
    source, site = (small(), SOURCE) if align == "spans" else (large(), TARGET)
    whole = record_between(source, large(), TEXTS, site, TARGET, **asked)
    found = record_between(source, large(), TEXTS, site, TARGET, skip=2, **asked)
    assert whole.counts is not None and found.counts is not None
    assert torch.equal(found.counts[site], whole.counts[site] - 2)
    assert torch.equal(found.source[site], whole.source[site][:, :, 2:])
    assert torch.equal(found.target[TARGET], whole.target[TARGET][:, :, 2:])
    assert whole.positions is not None and found.positions is not None
    for one, other in zip(found.positions, whole.positions, strict=True):
        assert torch.equal(one, other[:, 2:])
    assert found.unpaired["target tokens"] > whole.unpaired["target tokens"]


def test_what_cannot_be_left_out() -> None:
    with pytest.raises(InvalidInput, match="row 0: 'a red cat .* has [0-9]+ pairs of .* skip=40"):
        record_between(large(), large(), ["a red cat on a tree"], TARGET, TARGET, skip=40)
    with pytest.raises(InvalidInput, match="skip is a number of tokens from 0, got -1"):
        record_between(large(), large(), TEXTS, TARGET, TARGET, skip=-1)
    with pytest.raises(InvalidInput, match="skip=1 leaves out pairs of tokens of two language mod"):
        record_between(small(), large(), TEXTS, SOURCE, TARGET, align="mean", skip=1)
    with pytest.raises(InvalidInput, match="skip=1 leaves out pairs of tokens of two language mod"):
        record_between(unet(), unet(), TEXTS[:1], UNET, UNET, skip=1, num_inference_steps=1)


def test_means_over_own_tokens_can_be_paired_whatever_the_tokens() -> None:
    found = record_between(small(), large(), TEXTS, SOURCE, TARGET, align="mean", batch_size=3)
    assert found.counts is None and found.positions is None
    for row, prompt in enumerate(TEXTS):
        for reader, site, got in (
            (small(), SOURCE, found.source), (large(), TARGET, found.target)
        ):  # fmt: skip
            wanted = hooked(reader, site, prompt).mean(0)
            torch.testing.assert_close(got[site][row, 0, 0], wanted, rtol=1e-4, atol=1e-5)
    encoder = "text_encoder.encoder.layers.0"
    mixed = record_between(large(), unet(), TEXTS, TARGET, encoder, align="mean")
    assert mixed.source[TARGET].shape[:3] == mixed.target[encoder].shape[:3] == (3, 1, 1)
    with pytest.raises(InvalidInput, match="language model and of a pipeline's text encoder have"):
        record_between(large(), unet(), TEXTS, TARGET, encoder)


def test_a_tokenizer_that_says_no_characters_is_read_where_it_gives_the_text_back() -> None:
    reader = Reader(large().subject, text.gemma_tokenizer())
    slow = Slow(reader.tokenizer)
    found = record_between(
        Reader(large().subject, slow), large(), ["a red cat"], TARGET, TARGET, align="spans"
    )
    torch.testing.assert_close(found.source[TARGET], found.target[TARGET])


def test_tokenizers_without_offsets_that_change_the_text_are_refused() -> None:
    class Lower(Slow):
        def __call__(self, prompts: Any, *args: Any, **more: Any) -> Any:
            lower = prompts.lower() if isinstance(prompts, str) else [p.lower() for p in prompts]
            return self._own(lower, *args, **more)

    reader = Reader(large().subject, Lower(text.gemma_tokenizer()))
    with pytest.raises(InvalidInput, match="row 0: Lower gives 'A Cat' back as 'a cat', .*'mean'"):
        record_between(reader, large(), ["A Cat"], TARGET, TARGET, align="spans")


def test_parts_of_a_text_with_tokens_of_one_model_only_are_left_out() -> None:
    one, other = [(0, 1), (1, 2), (2, 3)], [(0, 1), (2, 3)]
    assert align_spans("abc", one, other) == [([0], [0]), ([2], [1])]
    assert align_spans("abc", other, one) == [([0], [0]), ([1], [2])]
    with pytest.raises(InvalidInput, match="'abc' has no characters that tokens of both models"):
        align_spans("abc", [(0, 1)], [(1, 3)])


class Slow:
    """A tokenizer without offsets."""

    is_fast = False

    def __init__(self, own: Any):
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __len__(self) -> int:
        return len(self._own)

    def __call__(self, *args: Any, **more: Any) -> Any:
        assert "return_offsets_mapping" not in more
        return self._own(*args, **more)


def called(reader: Reader, prompt: str, seed: int, arguments: dict[str, Any]) -> Tensor:
    """[calls, tokens, features] of the prompt's half of every call, by a hook."""
    kept: list[Tensor] = []
    module = reader.subject.unet.get_submodule(UNET.removeprefix("unet."))
    handle = module.register_forward_hook(lambda m, a, out: kept.append(out.detach()))
    generator = torch.Generator().manual_seed(seed)
    reader.subject(prompt=[prompt], generator=[generator], output_type="latent", **arguments)
    handle.remove()
    return torch.stack([each[1] for each in kept])


PROMPTS = ["a red cat", "a blue dog"]


def arguments(steps: int = 3) -> dict[str, Any]:
    return {"num_inference_steps": steps, "guidance_scale": 5.0, "height": 16, "width": 24}


def test_two_denoisers_with_equal_schedules_have_the_values_of_their_own_runs() -> None:
    found = record_between(unet(), wide(), PROMPTS, UNET, UNET, batch_size=2, **arguments())
    assert found.steps == (0, 1, 2) and found.times is not None
    assert found.source[UNET].shape[3] == 32 and found.target[UNET].shape[3] == 24
    for row, prompt in enumerate(PROMPTS):
        for reader, got in ((unet(), found.source), (wide(), found.target)):
            wanted = called(reader, prompt, row, arguments())
            torch.testing.assert_close(got[UNET][row], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["noise", "fraction"])
def test_calls_of_unequal_schedules_are_paired_by_choice(schedule: str) -> None:
    more = {"source_arguments": arguments(3), "target_arguments": arguments(6)}
    with pytest.raises(InvalidInput, match="called 3 times, the target's 6 times; choose how"):
        record_between(unet(), wide(), PROMPTS[:1], UNET, UNET, **more)
    found = record_between(unet(), wide(), PROMPTS[:1], UNET, UNET, schedule=schedule, **more)
    assert found.times is not None
    steps = [[each.step for each in side] for side in found.times]
    assert steps == [[0, 1, 2], {"fraction": [0, 2, 4], "noise": [1, 3, 5]}[schedule]]
    for number, (reader, got, count) in enumerate(
        ((unet(), found.source, 3), (wide(), found.target, 6))
    ):
        wanted = called(reader, PROMPTS[0], 0, arguments(count))[steps[number]]
        torch.testing.assert_close(got[UNET][0], wanted, rtol=1e-4, atol=1e-5)


def test_on_a_shared_trajectory_both_denoisers_see_the_same_latents() -> None:
    seen: dict[str, list[Tensor]] = {}
    for trajectory in ("own", "source", "target"):
        kept = seen[trajectory] = []
        handle = wide().subject.unet.register_forward_pre_hook(
            lambda m, args, kwargs, kept=kept: kept.append(args[0] if args else kwargs["sample"]),
            with_kwargs=True,
        )
        found = record_between(
            unet(), wide(), PROMPTS[:1], UNET, UNET, trajectory=trajectory, **arguments()
        )
        handle.remove()
        wanted = called(unet(), PROMPTS[0], 0, arguments())
        own = torch.allclose(found.source[UNET][0], wanted, rtol=1e-4, atol=1e-5)
        assert own == (trajectory != "target")
    inputs: list[Tensor] = []
    handle = unet().subject.unet.register_forward_pre_hook(
        lambda m, args, kwargs: inputs.append(args[0] if args else kwargs["sample"]),
        with_kwargs=True,
    )
    called(unet(), PROMPTS[0], 0, arguments())
    handle.remove()
    # three calls of the run, then the replayed ones in one batch
    torch.testing.assert_close(seen["source"][-1], torch.stack([each[1] for each in inputs]))
    with pytest.raises(InvalidInput, match="pairs calls of nearby ones; choose schedule='source'"):
        record_between(
            unet(), wide(), PROMPTS[:1], UNET, UNET, trajectory="source", schedule="noise",
            **arguments(),
        )  # fmt: skip


def test_what_has_no_partner_is_refused() -> None:
    asked = (unet(), wide(), PROMPTS)
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    for pair, text_, more in (
        ((block, UNET), r"grid of 8 x 12 and unet.mid.* a grid of 4 x 6.* align='place'", {}),
        ((UNET, "text_encoder.encoder.layers.0"), "their calls have no partners", {}),
        ((UNET, UNET), "align='spans' is for two language models", {"align": "spans"}),
        ((f"{UNET}:k", UNET), "k: the places of its 77 tokens in the picture", {"align": "place"}),
    ):
        with pytest.raises(InvalidInput, match=text_):
            record_between(*asked, *pair, **arguments(2), **more)
    assert record_between(*asked, block, UNET, align="mean", **arguments(2)).source[block].shape[
        :3
    ] == (2, 2, 1)
    for more, text_ in (
        ({"align": "tokens"}, "unknown alignment of tokens 'tokens'"),
        ({"schedule": "step"}, "unknown schedule of pairs 'step'"),
        ({"trajectory": "base"}, "unknown trajectory 'base'"),
        ({"span": "first"}, "unknown span 'first'"),
    ):
        with pytest.raises(UnknownName, match=text_):
            record_between(*asked, UNET, UNET, **arguments(2), **more)
    with pytest.raises(InvalidInput, match="'own' are for sites in denoisers; model.layers.1 and"):
        record_between(large(), large(), TEXTS, TARGET, TARGET, schedule="noise")
    with pytest.raises(InvalidInput, match="align='place' is for places of a picture"):
        record_between(large(), large(), TEXTS, TARGET, TARGET, align="place")
    for prompts, more, text_ in (
        ("a dog", {}, "prompts is a list of strings, got 'a dog'; give"),
        (["a dog"], {"target_prompts": "a dog"}, "prompts is a list of strings, got 'a dog'"),
        ([], {}, "prompts is a list of strings, got an empty one"),
        (["a dog"], {"batch_size": 0}, "batch_size is a whole number of at least 1, got 0"),
    ):
        with pytest.raises(InvalidInput, match=text_):
            record_between(unet(), wide(), prompts, UNET, UNET, **more)
    with pytest.raises(InvalidInput, match="as many teacher prompts as base prompts"):
        record_between(*asked, UNET, UNET, target_prompts=["a dog"])


@pytest.mark.parametrize("resample", ["area", "bilinear"])
def test_places_of_grids_of_any_size_are_brought_to_that_of_the_target(resample: str) -> None:
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    found = record_between(
        unet(), unet(), PROMPTS, [block, UNET], [block, UNET], align="place", **arguments(2)
    )
    assert found.grids is not None
    assert [(g[block], g[UNET]) for g in found.grids] == [((8, 12), (4, 6))] * 2
    fine, coarse = found.source[block], found.source[UNET]
    x, y = found.values_at(block, UNET, resample)
    means = fine.reshape(2, 2, 4, 2, 6, 2, -1).mean((3, 5)).flatten(2, 3)  # both ways, at one half
    torch.testing.assert_close(x, means)
    assert y is found.target[UNET]
    x, _ = found.values_at(UNET, block, resample)
    # by hand: halves lie a quarter of a place beside the middles
    grid = coarse.reshape(2, 2, 4, 6, -1)
    wanted = 0.75 * (0.75 * grid[..., 1, 2, :] + 0.25 * grid[..., 1, 1, :])
    wanted += 0.25 * (0.75 * grid[..., 0, 2, :] + 0.25 * grid[..., 0, 1, :])
    torch.testing.assert_close(x[:, :, 2 * 12 + 4], wanted)
    same, _ = found.values_at(block, block, resample)
    assert same is fine


def test_a_coarser_grid_has_the_means_over_its_areas_where_sizes_do_not_divide() -> None:
    line = torch.tensor([[0.0, 3.0, 0.0]] * 3).reshape(9, 1)
    torch.testing.assert_close(resample_grid(line, (3, 3), (2, 2)), torch.ones(4, 1))
    values = torch.randn(2, 6 * 9, 5, dtype=torch.float64)
    # on squares that both grids consist of
    fine = values.reshape(2, 6, 9, 5).repeat_interleave(2, 1).repeat_interleave(2, 2)
    wanted = fine.reshape(2, 4, 3, 6, 3, 5).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(resample_grid(values, (6, 9), (4, 6)), wanted)


def test_grids_that_have_no_places_in_common_are_refused() -> None:
    values = torch.randn(3, 8, 5)
    for grid in (None, (0, 0), (8,), (2.0, 4.0)):
        with pytest.raises(InvalidInput, match="a grid is its .height, width., whole numbers"):
            resample_grid(values, (2, 4), grid)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="are of floating point, got torch.int64"):
        resample_grid(values.long(), (2, 4), (1, 2))
    with pytest.raises(
        InvalidInput, match="grids of 2 x 4 and of 2 x 2 are of pictures of another"
    ):
        resample_grid(values, (2, 4), (2, 2))
    with pytest.raises(InvalidInput, match="a grid of 2 x 2 has 4 tokens, got 8"):
        resample_grid(values, (2, 2), (4, 4))
    with pytest.raises(UnknownName, match="unknown resampling of grids 'nearest'"):
        resample_grid(values, (2, 4), (4, 8), "nearest")


def test_pairs_of_two_models_have_rows_and_calls_in_common_and_need_no_more() -> None:
    pairs = Pairs({"a": torch.zeros(2, 1, 3, 4)}, {"b": torch.zeros(2, 1, 3, 5)}, None)
    assert (pairs.source, pairs.target) == (pairs.base, pairs.teacher)
    with pytest.raises(
        InvalidInput, match=r"b: .* as many rows and calls .* got \[3, 1\] and \[2,"
    ):
        Pairs({"a": torch.zeros(2, 1, 3, 4)}, {"b": torch.zeros(3, 1, 3, 4)}, None)
    with pytest.raises(InvalidInput, match="a: pairs need equal shapes, base .*, teacher nothing"):
        ActivationMatch(pairs)


def test_text_tokens_of_pipelines_need_tokenizers_that_cut_alike() -> None:
    found = record_between(unet(), wide(), PROMPTS, f"{UNET}:k", f"{UNET}:k", **arguments(1))
    assert found.source[f"{UNET}:k"].shape[:3] == (2, 1, 77)
    other = Reader(tiny.pipeline("sd"))
    other.subject.tokenizer = Upside(other.subject.tokenizer)
    with pytest.raises(InvalidInput, match="cut the prompts into different tokens"):
        record_between(unet(), other, PROMPTS, f"{UNET}:k", f"{UNET}:k", **arguments(1))


class Upside(Slow):
    """A tokenizer that turns the words round."""

    def __call__(self, prompts: Any, *args: Any, **more: Any) -> Any:
        turned = [" ".join(reversed(each.split())) for each in prompts]
        return self._own(turned, *args, **more)
