"""Streamed activations against recordings of the same run: values, coordinates, refusals."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dreamreader.edits import Steer
from dreamreader.engine import Activation, Box, Flowing, Reader, Record, Stream, Watch
from dreamreader.errors import ClockUnknown, InvalidInput, NeverFired

PROMPTS = ["a red cat", "a red dog on a tree"]
SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"


@dataclass
class Piece:
    """A copy of what is kept of one entry in one call."""

    branch: str
    row: int
    time: tuple[int, int]
    tokens: list[int]
    positions: list[int]
    values: Tensor  # [tokens, features]


class Copies:
    """Copies what a stream keeps."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.calls: list[Flowing] = []
        self.moments: list[tuple[int | None, int | None]] = []

    def __call__(self, flowing: Flowing) -> None:
        self.calls.append(flowing)
        self.moments.append((flowing.moment, flowing.moments))
        x = flowing.x if flowing.minus is None else flowing.x - flowing.minus
        at = flowing.instant
        names = [(branch, row) for branch in flowing.branches for row in flowing.rows]
        assert flowing.index.tolist() == flowing.entries and len(names) == len(flowing.entries)
        for each in (flowing.index, flowing.tokens, flowing.offsets, flowing.shift):
            assert each.dtype == torch.int32 and each.device.type == "cpu"
        for n, (branch, row) in enumerate(names):
            tokens = flowing.tokens[flowing.offsets[n] : flowing.offsets[n + 1]]
            self.pieces.append(
                Piece(
                    branch,
                    row,
                    (-1, 0) if at is None else (at.step, at.evaluation),
                    tokens.tolist(),
                    (tokens + flowing.shift[n]).tolist(),
                    x[flowing.entries[n], tokens].clone(),
                )
            )


@cache
def reader(name: str = "sd") -> Reader:
    return Reader(tiny.pipeline(name))


def run(record: Any, name: str = "sd", steps: int = 2, pipe: Any = None, **kw: Any) -> Any:
    arguments = {**tiny.arguments(name, steps), "output_type": "latent", "seeds": 0, **kw}
    if "img2img" in name:
        arguments["image"] = torch.full((1, 3, 16, 24), 0.5)
    prompts = arguments.pop("prompts", PROMPTS)
    return (reader(name) if pipe is None else Reader(pipe)).run(prompts, record=record, **arguments)


def check(pieces: list[Piece], found: Activation) -> None:
    """The pieces hold every value of a recording at its coordinates, and nothing else."""
    tensor = found.tensor if "branch" in found.axes else found.tensor.unsqueeze(1)
    tensor = tensor.flatten(4)  # heads side by side
    times = [(each.step, each.evaluation) for each in found.steps]
    rows = [each.index for each in found.rows]
    left = {(branch, row, time) for branch in found.branches for row in rows for time in times}
    for each in pieces:
        left.remove((each.branch, each.row, each.time))
        expected = tensor[rows.index(each.row), found.branches.index(each.branch)]
        assert torch.equal(each.values, expected[times.index(each.time)])
        if found.tokens is not None:
            assert each.tokens == list(found.tokens)
    assert not left


SOFT = torch.linspace(-0.2, 1, 24).clamp(min=0)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whole": ("sd", SITE, {}),
    "heads": ("sd", f"{SITE}:heads", {"branch": "cond", "steps": [1]}),
    "query": ("sd", f"{SITE}:q", {"branch": ("cond", "uncond"), "rows": slice(1, None)}),
    "delta": ("sd", f"{SITE}:delta", {"rows": [1]}),
    "map": ("sd", "unet.mid_block", {"tokens": [0, -1]}),
    "box": ("sd", "unet.mid_block", {"tokens": Box(0, 0, 0.5, 0.5), "steps": -1}),
    "mask": ("sd", "unet.mid_block", {"tokens": SOFT > 0.3, "fraction": (0.0, 0.5)}),
    "input": ("sd", "unet.mid_block:in", {"rows": 0, "branch": "uncond"}),
    "root": ("sd", "unet", {}),
    "text": ("sd", "text_encoder.encoder.layers.0", {}),
    "word": ("sd", "text_encoder.encoder.layers.0", {"tokens": "red", "branch": "cond"}),
    "key-word": ("sd", f"{SITE}:k", {"tokens": "red", "branch": "cond"}),
    "image": ("sd3", "transformer.transformer_blocks.0", {}),
    "image-text": ("sd3", "transformer.transformer_blocks.0:out.text", {"tokens": [3]}),
    "joint": ("flux", "transformer.single_transformer_blocks.0", {}),
    "joint-image": ("flux", "transformer.single_transformer_blocks.0:out.image", {"tokens": [3]}),
    "joint-text": ("flux", "transformer.single_transformer_blocks.0:out.text", {}),
    "calls-apart": ("flux-true-cfg", "transformer.transformer_blocks.0", {}),
    "begun-late": ("sd-img2img", SITE, {"branch": "cond"}),
    "decoder": ("sd", "vae.decoder.mid_block", {"output_type": "np"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stream_equals_a_recording(case: str) -> None:
    name, site, kw = CASES[case]
    kw = dict(kw)
    picture = {"output_type": kw.pop("output_type", "latent")}
    copies = Copies()
    steps = 5 if "img2img" in name else 2
    result = run([Record(site, **kw), Stream(site, copies, **kw)], name, steps, **picture)
    check(copies.pieces, result.cache[site])
    one, other = result.firing
    assert (other.kind, other.calls, other.steps) == ("record", one.calls, one.steps)
    assert (other.branches, other.rows) == (one.branches, one.rows)


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
@pytest.mark.parametrize("name", ["sd", "sd-img2img"])
def test_every_evaluation_has_its_moment(scheduler: str, name: str) -> None:
    pipe = tiny.pipeline(name)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    copies, late, picked = Copies(), Copies(), Copies()
    streams = [
        Stream(SITE, copies, branch="cond"),
        Stream(SITE, late, steps=slice(-2, None)),
        Stream(SITE, picked, steps=lambda step: step == 3),
    ]
    found = run([Record(SITE, branch="cond"), *streams], name, 5, pipe).cache[SITE]
    check(copies.pieces, found)
    count = len(found.steps)
    assert count == (5 if "img2img" in name else 9)
    assert copies.moments == [(n, count) for n in range(count)]
    assert late.moments == [(0, 3), (1, 3), (2, 3)]
    assert picked.moments == [(0, 2), (1, 2)]


def test_moments_are_those_of_the_run_that_is_on() -> None:
    copies, pipe = Copies(), reader().subject
    kw = {"output_type": "latent", **tiny.arguments("sd", 2)}
    with reader().recording(Stream(SITE, copies, branch="cond", steps=slice(1, None))):
        pipe(PROMPTS[0], **kw)
        pipe(PROMPTS[0], **{**kw, "num_inference_steps": 4})
    assert copies.moments == [(0, 1), (0, 3), (1, 3), (2, 3)]
    assert len({each.run for each in copies.calls}) == 2
    assert len({each.key for each in copies.calls}) == 1


def test_a_soft_mask_keeps_what_has_strength() -> None:
    copies = Copies()
    site = "unet.mid_block"
    found = run([Record(site), Stream(site, copies, tokens=SOFT)]).cache[site]
    kept = SOFT > 0
    check(copies.pieces, run(Record(site, tokens=kept)).cache[site])
    assert copies.calls[0].hw == found.hw == (4, 6)
    assert copies.pieces[0].tokens == kept.nonzero().flatten().tolist()


def test_rows_may_keep_different_numbers_of_tokens() -> None:
    copies, site = Copies(), "text_encoder.encoder.layers.0"
    word = {"tokens": "tree", "branch": "cond"}
    prompts = ["a tree", "a tree, a tree"]
    whole = run([Record(site), Stream(site, copies, **word)], prompts=prompts, steps=1)
    first, second = copies.pieces
    assert (first.tokens, len(second.tokens)) == ([2, 3, 4], 6)
    for each in (first, second):
        expected = whole.cache[site].select(branch="cond", rows=[each.row]).tensor[0, 0]
        assert torch.equal(each.values, expected[each.tokens])


def test_image_tokens_behind_texts_of_different_length() -> None:
    copies, site = Copies(), "transformer.layers.0"
    stream = Stream(f"{site}:out.image", copies, branch="cond")
    whole = run([Record(site, branch="cond"), stream], "lumina2", 1).cache[site]
    (flowing,) = copies.calls
    lengths = flowing.starts
    assert lengths[1] - lengths[0] == len(PROMPTS[1].split()) - len(PROMPTS[0].split())
    for each, start in zip(copies.pieces, lengths, strict=True):
        assert each.tokens == list(range(start, start + 24)) and flowing.hw == (4, 6)
        assert torch.equal(each.values, whole.tensor[each.row, 0, each.tokens])


def test_rows_are_those_of_the_run_in_every_batch() -> None:
    copies = Copies()
    found = run([Record(SITE), Stream(SITE, copies)], batch_size=1).cache[SITE]
    assert [each.rows for each in copies.calls] == [(0,), (0,), (1,), (1,)]
    check(copies.pieces, found)


def test_it_is_the_memory_of_the_model() -> None:
    addresses: list[int] = []
    pipe = tiny.pipeline("sd")
    for module in (pipe.unet.mid_block, pipe.unet.mid_block.attentions[0]):
        module.register_forward_hook(lambda _, __, out: addresses.append(_tensor(out).data_ptr()))
    seen: list[Flowing] = []
    sites = ["unet.mid_block.attentions.0", "unet.mid_block"]
    run(Stream(sites, seen.append), steps=1, pipe=pipe)
    assert [each.x.data_ptr() for each in seen] == addresses
    assert seen[1].x.shape == (4, 24, 32) and seen[1].x.stride() == (24 * 32, 1, 24)
    heads: list[Flowing] = []
    run(Stream(f"{SITE}:heads", heads.append), steps=1)
    assert heads[0].x.shape == (4, 24, 32) and heads[0].site.heads == 2


def _tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


class Differences(TorchDispatchMode):
    """Counts the subtractions of whole activations."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.sub.Tensor and out.shape == self.shape:
            self.count += 1
        return out


def test_a_delta_is_left_to_the_reader() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)  # in place: the input has to be kept for the difference

    net = nn.Sequential(nn.Linear(4, 4), Adds())
    x = torch.randn(2, 3, 4)
    given = net[0](x).detach()
    seen: list[tuple[Tensor, Tensor | None]] = []
    stream = Stream("1:delta", lambda each: seen.append((each.x.clone(), each.minus)))
    with torch.no_grad(), Differences((2, 3, 4)) as plain, Reader(net).recording(stream):
        net(x)
    with torch.no_grad(), Differences((2, 3, 4)) as both:
        with Reader(net).recording([stream, "1:delta"]) as cache:
            net(x)
    assert (plain.count, both.count) == (0, 1)
    for whole, minus in seen:
        assert minus is not None and torch.equal(minus, given)
        assert torch.equal(whole - minus, cache["1:delta"].tensor[:, 0])
    assert len(seen) == 2


def test_a_delta_of_two_types_is_formed_by_torch() -> None:
    class Widens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double() / 3

    net = nn.Sequential(Widens())
    x = torch.randn(2, 3, 4)
    copies = Copies()
    with Reader(net).recording(["0:delta", Stream("0:delta", copies)]) as cache:
        net(x)
    (flowing,) = copies.calls
    assert flowing.minus is None and flowing.x.dtype == torch.float64
    assert torch.equal(flowing.x, cache["0:delta"].tensor[:, 0])
    assert torch.equal(flowing.x, x.double() / 3 - x)


def test_edits_come_first() -> None:
    copies, plain = Copies(), Copies()
    edit = Steer(f"{SITE}:delta", torch.ones(32), 2.0, branch="cond", steps=1)
    records = [f"{SITE}:delta", Stream(f"{SITE}:delta", copies)]
    found = run(records, edits=edit).cache[f"{SITE}:delta"]
    check(copies.pieces, found)
    run(Stream(f"{SITE}:delta", plain))
    # the edit makes the difference, in the step in which it acts
    assert [each.minus is None for each in copies.calls] == [False, True]
    for before, after in zip(plain.pieces, copies.pieces, strict=True):
        moved = 2.0 if (after.branch, after.time) == ("cond", (1, 0)) else 0.0
        change = after.values - before.values
        if after.time == (0, 0) or moved:
            torch.testing.assert_close(change, torch.full_like(change, moved))


def test_calls_of_one_kind_share_a_key() -> None:
    one, other = Copies(), Copies()
    run([Stream(SITE, one), Stream(SITE, other, steps=[0, 2], branch="cond")], steps=3)
    assert len({each.key for each in one.calls}) == 1
    assert len({each.key for each in other.calls}) == 1 and len(other.calls) == 2
    assert one.calls[0].key is not other.calls[0].key
    pieces, batches = Copies(), Copies()
    run(Stream(["unet.mid_block", SITE], pieces), steps=2)
    assert [each.key.site.path for each in pieces.calls[:2]] == [SITE, "unet.mid_block"]
    assert len({each.key for each in pieces.calls}) == 2
    with reader().recording(Stream(SITE, batches)):
        for prompts in (PROMPTS, PROMPTS[:1], PROMPTS):
            reader().subject(prompts, output_type="latent", **tiny.arguments("sd", 1))
    first, second, third = (each.key for each in batches.calls)
    assert first is third and first is not second
    sizes = Copies()
    net = nn.Sequential(nn.ReLU())
    with Reader(net).recording(Stream("0", sizes, tokens=[0])):
        for tokens, dtype in ((3, torch.float), (4, torch.float), (3, torch.half)):
            net(torch.ones(2, tokens, 5, dtype=dtype))
    assert len({each.key for each in sizes.calls}) == 3


def test_what_runs_outside_has_no_time() -> None:
    copies = Copies()
    run(
        Stream(["text_encoder.encoder.layers.0", "vae.decoder.mid_block"], copies), output_type="np"
    )
    assert [each.instant for each in copies.calls] == [None] * 3
    assert [each.branches for each in copies.calls] == [("cond",), ("uncond",), ("unknown",)]
    assert copies.moments == [(0, 1)] * 3
    assert not any(each.shift.any() for each in copies.calls)


def test_gradients_stay_with_the_model() -> None:
    net, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), []
    with Reader(net).recording(Stream(["0", "1:delta"], seen.append)):
        net(torch.randn(2, 3, 4)).sum().backward()
    assert not any(each.x.requires_grad for each in seen)
    assert not seen[1].minus.requires_grad
    assert net[0].weight.grad is not None


# Language models


SETTINGS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@cache
def language(name: str = "gpt2") -> Reader:
    return Reader(*tiny.language_model(name))


def test_padding_is_left_out_and_positions_are_the_rows_own() -> None:
    copies, site = Copies(), "transformer.h.1"
    found = language().run(PROMPTS, record=[site, Stream(site, copies)]).cache[site]
    total = found.shape[2]
    lengths = [len(language().tokenizer(each).input_ids) for each in PROMPTS]
    assert lengths[0] < lengths[1] == total
    assert [each.branch for each in copies.pieces] == ["cond", "cond"]
    for each, length in zip(copies.pieces, lengths, strict=True):
        assert each.tokens == list(range(total - length, total))
        assert each.positions == list(range(length))
        assert torch.equal(each.values, found.tensor[each.row, 0, -length:])
    assert copies.moments == [(None, None)]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_generation_goes_on_in_position(name: str, cached: bool) -> None:
    copies = Copies()
    site = "transformer.h.1" if name == "gpt2" else "model.layers.1"
    kw = {**SETTINGS, "use_cache": cached}
    language(name).run(PROMPTS, record=Stream(site, copies), **kw)
    lengths = [len(language(name).tokenizer(each).input_ids) for each in PROMPTS]
    assert [each.instant.step for each in copies.calls if each.instant] == [0, 1, 2, 3]
    for row, length in enumerate(lengths):
        own = [each for each in copies.pieces if each.row == row]
        new = [list(range(length))] + [[length + step] for step in range(3)]
        grown = [list(range(length + step)) for step in range(4)]
        assert [each.positions for each in own] == (new if cached else grown)
    if cached:
        found = (
            language(name).run(PROMPTS, record=Record(site, steps=slice(1, None)), **kw).cache[site]
        )
        check([each for each in copies.pieces if each.time[0] > 0], found)
        assert len({each.key for each in copies.calls}) == 2, "one for the prompt, one after it"


@pytest.mark.parametrize("tokens", ["red", [0, 2], slice(1, 3), -1])
def test_tokens_of_a_language_model_are_those_of_a_recording(tokens: Any) -> None:
    copies, site = Copies(), "transformer.h.0"
    prompts = ["a red cat", "my old red dog"]
    kw: dict[str, Any] = {"tokens": tokens}
    found = language().run(prompts, record=[Record(site, **kw), Stream(site, copies, **kw)])
    check(copies.pieces, found.cache[site])
    if not isinstance(tokens, str):
        lengths = [len(language().tokenizer(each).input_ids) for each in prompts]
        for each in copies.pieces:
            assert each.positions == torch.arange(lengths[each.row])[tokens].flatten().tolist()


def test_tokens_are_chosen_anew_at_every_position() -> None:
    copies, site = Copies(), "transformer.h.0"
    record = Stream(site, copies, tokens=slice(0, None, 2))
    language().run(PROMPTS, record=record, **SETTINGS)
    for row, prompt in enumerate(PROMPTS):
        own = [at for each in copies.pieces if each.row == row for at in each.positions]
        total = len(language().tokenizer(prompt).input_ids) + 3
        assert own == list(range(0, total, 2))


def test_batches_of_one_length_may_have_other_padding() -> None:
    copies, model = Copies(), language().subject
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with language().recording(Stream("transformer.h.0", copies)), torch.no_grad():
        for pads in ((0, 1), (2, 0)):
            mask = torch.tensor([[at >= pad for at in range(3)] for pad in pads]).long()
            model(ids, attention_mask=mask)
    assert [each.tokens for each in copies.pieces] == [[0, 1, 2], [1, 2], [2], [0, 1, 2]]
    assert [each.positions for each in copies.pieces] == [[0, 1, 2], [0, 1], [0], [0, 1, 2]]


def test_a_call_that_keeps_no_token_is_not_handed_on() -> None:
    copies, site = Copies(), "transformer.h.0"
    result = language().run(PROMPTS, record=Stream(site, copies, tokens=[0, 1]), **SETTINGS)
    assert [each.positions for each in copies.pieces] == [[0, 1], [0, 1]]
    found = result.firing[0]
    assert (found.calls, found.missed) == (1, 3) and dict(found.branches) == {"cond": 1}


def test_positions_that_are_not_known_are_refused() -> None:
    model, copies = language().subject, Copies()
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    past = model(ids).past_key_values
    with pytest.raises(ClockUnknown, match="transformer.h.0: streaming needs the step. the cache"):
        with language().recording(Stream("transformer.h.0", copies)), torch.no_grad():
            model(ids[:, :1], past_key_values=past)
    assert not copies.calls
    with language().recording(Stream("transformer.h.0", copies)), torch.no_grad():
        with pytest.raises(InvalidInput, match="transformer.h.0: the attention mask leaves out"):
            model(ids, attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]]))
        assert not copies.calls
        model(ids, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert [each.positions for each in copies.pieces] == [[0, 1, 2], [0, 1]]


def test_modules_behind_the_last_block_see_the_last_token_while_generating() -> None:
    copies = Copies()
    result = language().run(PROMPTS, record=Stream("lm_head", copies), **SETTINGS)
    lengths = [len(language().tokenizer(each)["input_ids"]) for each in PROMPTS]
    steps = result.firing[0].calls
    expected = [[length - 1 + step] for step in range(steps) for length in lengths]
    assert [each.positions for each in copies.pieces] == expected


# Refusals


def test_bad_streams_say_why() -> None:
    with pytest.raises(InvalidInput, match="Stream: callback must be a function, got list"):
        Stream(SITE, [])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"unet.\*\*:probs are attention prob.*use Watch or Rec"):
        Stream("unet.**:probs", print)
    with pytest.raises(InvalidInput, match="record: got int 3"):
        run([Stream(SITE, print), 3])
    assert repr(Stream(SITE, print, steps=[1])) == f"Stream({SITE}, steps=[1])"


def test_what_never_fires_is_an_error() -> None:
    copies = Copies()
    with pytest.raises(NeverFired, match=r"Stream\(.*steps=\[7\]\) can never fire"):
        run(Stream(SITE, copies, steps=[7]))
    with pytest.raises(NeverFired, match="never fired at unet.conv_norm_out: .*not called"):
        with reader().recording(Stream("unet.conv_norm_out", copies)):
            pass
    with pytest.raises(ClockUnknown, match="text_encoder.*: a step window was asked for"):
        run(Stream("text_encoder.encoder.layers.0", copies, steps=0))
    assert not copies.calls
    run(Stream(SITE, copies, steps=[]))
    assert not copies.calls


class Unlisted(diffusers.StableDiffusionPipeline):
    """A pipeline with a loop of its own, whose guidance is not known."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def test_unknown_time_or_branch_is_refused_before_anything_is_handed_on() -> None:
    copies, pipe = Copies(), reader().subject
    latents, text = torch.zeros(1, 4, 8, 12), torch.zeros(1, 77, 16)
    with pytest.raises(ClockUnknown, match="attn1: streaming needs the step. unet was called outs"):
        with reader().recording(Stream("unet.**.attn1", copies)), torch.no_grad():
            pipe.unet(latents, 5, text)
    unlisted = Unlisted(**pipe.components, requires_safety_checker=False)
    unlisted.set_progress_bar_config(disable=True)
    with pytest.raises(ClockUnknown, match=f"{SITE}: streaming needs the branch. .*Unlisted lays"):
        with Reader(unlisted).recording(Stream(SITE, copies)):
            unlisted(PROMPTS, output_type="latent", **tiny.arguments("sd", 1))
    assert not copies.calls


def _going_back() -> dict[str, Any]:
    """Arguments of a run that calls the denoiser once more at step 0, after step 1."""

    def again(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        if step == 1:
            latents = torch.cat([tensors["latents"]] * 2)
            pipe.unet(latents, pipe.scheduler.timesteps[0], tensors["prompt_embeds"])
        return tensors

    names = ["latents", "prompt_embeds"]
    return {"callback_on_step_end": again, "callback_on_step_end_tensor_inputs": names}


def test_what_a_callback_calls_is_not_streamed() -> None:
    plain, called = Copies(), Copies()
    run(Stream(SITE, plain))
    run(Stream(SITE, called), **_going_back())
    assert len(plain.pieces) == len(called.pieces) > 0
    for one, other in zip(plain.pieces, called.pieces, strict=True):
        assert one.time == other.time and torch.equal(one.values, other.values)


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    copies = Copies()
    with pytest.raises(
        InvalidInput, match="nonlinearity ran more than once at step 0 with the sam"
    ):
        run(Stream("unet.mid_block.resnets.0.nonlinearity", copies))
    site, big = "vae.decoder.mid_block", {"height": 64, "width": 64, "output_type": "np"}
    pipe = tiny.pipeline("sd")
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 16
    with pytest.raises(
        InvalidInput, match=f"{site} ran more than once at the same moment.*VAE til"
    ):
        run(Stream(site, copies), steps=1, pipe=pipe, **big)
    pipe.vae.disable_tiling()
    pipe.vae.enable_slicing()
    with pytest.raises(InvalidInput, match="Slicing .* splits the batch"):
        run(Stream(site, copies), steps=1, pipe=pipe, output_type="np")


def test_a_failing_reader_leaves_nothing_behind() -> None:
    def fails(flowing: Flowing) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(Stream(SITE, fails))
    module = reader().subject.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert not module._forward_hooks and not reader().subject.unet._forward_hooks


def test_steps_that_a_cache_skips_are_not_handed_on() -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    pipe, copies = tiny.pipeline("flux"), Copies()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    site = "transformer.transformer_blocks.1"
    result = run([site, Stream(site, copies)], "flux", 3, pipe)
    check(copies.pieces, result.cache[site])
    assert [each.time for each in copies.pieces] == [(0, 0)] * 2
    assert dict(result.firing[1].not_computed) == {1: 1, 2: 1}


def test_a_compiled_denoiser_is_streamed_uncompiled() -> None:
    plain, copies = Copies(), Copies()
    run(Stream(SITE, plain))
    pipe = tiny.pipeline("sd")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    result = run(Stream(SITE, copies), pipe=pipe)
    assert "ran uncompiled" in result.firing.notes[0]
    for one, other in zip(plain.pieces, copies.pieces, strict=True):
        assert torch.equal(one.values, other.values)
        assert (one.branch, one.row, one.time) == (other.branch, other.row, other.time)


def test_a_watch_and_a_stream_share_a_module() -> None:
    copies, shapes = Copies(), []
    watch = Watch(f"{SITE}:probs", lambda attention, call: shapes.append(attention.shape))
    found = run([watch, Stream(f"{SITE}:heads", copies), f"{SITE}:heads"]).cache
    check(copies.pieces, found[f"{SITE}:heads"])
    assert shapes == [(4, 2, 24, 77)] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_graph_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4)).cuda()
    x = torch.zeros(1, 2, 4, device="cuda")
    with torch.no_grad():
        net(x)
        with pytest.raises(InvalidInput, match="0: cannot be streamed while a CUDA graph is"):
            with (
                Reader(net).recording(Stream("0", print)),
                torch.cuda.graph(torch.cuda.CUDAGraph()),
            ):
                net(x)
