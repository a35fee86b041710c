"""Stitched runs: those of hand-made hooks, bit-equal where nothing may change; bad input."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import HeunDiscreteScheduler
from tiny import tokenizers
from torch import Tensor

from dreamreader import load
from dreamreader.edits import Ablate, Donation, Stitch
from dreamreader.engine import Reader, Record
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.mapping import (
    ActivationMap,
    AffineMap,
    LocalMap,
    NoiseConditionedMap,
    StepMaps,
    lock_step,
    stitch,
)

PROMPTS = ["a small red star on a white background", "a large blue circle", "a green square"]
SEEDS = [3, 4, 5]
BLOCK, ATTENTION = (
    "unet.up_blocks.1",
    "unet.up_blocks.2.attentions.1.transformer_blocks.0.attn2",
)
CALL: dict[str, Any] = {
    "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent", "progress": False,
}  # fmt: skip
RUN = CALL | {"seeds": SEEDS}


@cache
def model(name: str, number: int = 0) -> Reader:
    return load(name)


def a() -> Reader:
    return model("shapes-unet")


def b() -> Reader:
    return model("shapes-unet-b")


@cache
def widths(site: str) -> tuple[int, int, int]:
    """Features of the source and of the target at a site, and its tokens."""
    found = [
        reader.run(PROMPTS[:1], record=site, **CALL).cache[site].tensor.shape
        for reader in (a(), b())
    ]
    return found[0][-1], found[1][-1], found[0][-2]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5


def affine(site: str, seed: int = 0) -> AffineMap:
    x, y, _ = widths(site)
    return AffineMap(torch.zeros(x), draw(y, x, seed=seed), draw(1, y, seed=seed + 1)[0])


@cache
def native(number: int = 0) -> Tensor:
    return model("shapes-unet", number).run(PROMPTS, **RUN).output


# references by plain hooks


def by_hooks(
    site: str, mapped: Callable[[Tensor, float], Tensor], mix: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Latents of the target, whose every call is preceded by one of the source on its input.

    Args:
        mapped: of tokens [batch, tokens, d_source] and the level of the call. mix: the site's own
            tokens with these.
    """
    source, target = a().subject, b().subject
    embeds, negative = source.encode_prompt(PROMPTS, "cpu", 1, True)
    states = torch.cat([negative, embeds])
    given: list[Tensor] = []
    levels: list[float] = []

    def tokens(out: Any) -> Tensor:
        return out.flatten(2).mT if out.dim() == 4 else out

    def keep(module: Any, args: Any, out: Any) -> None:
        given.append(tokens(out))

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        timestep = args[1]
        kept = target.scheduler.alphas_cumprod[int(timestep)]
        levels.append(float(((1 - kept) / kept).sqrt()))
        source.unet(args[0], timestep, encoder_hidden_states=states)

    def replace(module: Any, args: Any, out: Tensor) -> Tensor:
        own = tokens(out)
        new = mix(own, mapped(given.pop(), levels[-1]))
        return new.mT.reshape(out.shape) if out.dim() == 4 else new

    path = site.removeprefix("unet.")
    hooks = [
        source.unet.get_submodule(path).register_forward_hook(keep),
        target.unet.get_submodule(path).register_forward_hook(replace),
        target.unet.register_forward_pre_hook(begin, with_kwargs=True),
    ]
    try:
        with torch.no_grad():
            drawn = [torch.Generator().manual_seed(seed) for seed in SEEDS]
            arguments = {k: v for k, v in CALL.items() if k != "progress"}
            return target(PROMPTS, generator=drawn, **arguments).images
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("site", [BLOCK, ATTENTION])
def test_a_stitched_run_is_that_of_plain_hooks(site: str) -> None:
    own = affine(site)
    wanted = by_hooks(site, lambda x, level: x @ own.weight.T + own.bias, lambda h, y: y)
    got = stitch(a(), b(), PROMPTS, {site: (site, own)}, **RUN)
    torch.testing.assert_close(got.output, wanted, rtol=1e-4, atol=1e-4)
    small = stitch(a(), b(), PROMPTS, {site: (site, own)}, **(RUN | {"batch_size": 2}))
    torch.testing.assert_close(small.output, wanted, rtol=1e-4, atol=1e-4)
    assert (got.firing[0].calls, sorted(got.firing[0].branches)) == (2, ["cond", "uncond"])


@pytest.mark.parametrize("strength", [-0.5, 0.3, 1.5])
def test_a_blend_is_taken_on_rows_and_branches_alone(strength: float) -> None:
    own = affine(ATTENTION)
    rows = torch.tensor([0.0, strength, 1.0])
    share = torch.cat([torch.zeros(3), rows])[:, None, None]  # uncond, then cond

    def mix(h: Tensor, y: Tensor) -> Tensor:
        return (1 - share) * h + share * y

    wanted = by_hooks(ATTENTION, lambda x, level: x @ own.weight.T + own.bias, mix)
    got = stitch(
        a(), b(), PROMPTS, {ATTENTION: (ATTENTION, own)}, strength=rows.tolist(), branch="cond",
        **RUN,
    )  # fmt: skip
    torch.testing.assert_close(got.output, wanted, rtol=1e-4, atol=1e-4)
    plain = b().run(PROMPTS, **RUN).output
    assert torch.equal(got.output[0], plain[0])
    assert not torch.equal(got.output[1], plain[1])


def test_maps_get_grid_level_and_step() -> None:
    x, y, tokens = widths(BLOCK)
    side = round(tokens**0.5)
    local = LocalMap(
        torch.zeros(x), draw(y, 9 * x).reshape(y, x, 3, 3), torch.zeros(y), (side,) * 2
    )

    def convolved(values: Tensor, level: float) -> Tensor:
        grid = values.mT.unflatten(2, (side, side))
        return torch.nn.functional.conv2d(grid, local.weight, padding=1).flatten(2).mT

    noisy = NoiseConditionedMap(
        torch.zeros(x), draw(2 * y, x).reshape(2, y, x), torch.zeros(2, y), 0.5, 4.0
    )

    def at_level(values: Tensor, level: float) -> Tensor:
        s = ((torch.tensor(level).log() - 0.5) / 4.0).clamp(-1, 1)
        return values @ (noisy.weight[0] + s * noisy.weight[1]).T

    each = [affine(BLOCK, seed) for seed in (4, 8)]
    stepped = StepMaps(torch.zeros(x), each, [0, 1])
    calls: list[float] = []

    def at_step(values: Tensor, level: float) -> Tensor:
        calls.append(level)
        now = each[len(calls) - 1]
        return values @ now.weight.T + now.bias

    cases: list[tuple[ActivationMap, Callable[[Tensor, float], Tensor]]]
    cases = [(local, convolved), (noisy, at_level), (stepped, at_step)]
    for own, by_hand in cases:
        wanted = by_hooks(BLOCK, by_hand, lambda h, y: y)
        got = stitch(a(), b(), PROMPTS, {BLOCK: (BLOCK, own)}, **RUN).output
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


# what may not change


@pytest.mark.parametrize("trajectory", ["target", "own"])
@pytest.mark.parametrize("sites", [[BLOCK], [ATTENTION, "unet.mid_block"], ["text_encoder"]])
def test_a_model_stitched_into_its_double_is_itself_to_the_bit(
    trajectory: str, sites: list[str]
) -> None:
    double = model("shapes-unet", 1)
    found = stitch(
        double, a(), PROMPTS, {s: (s, None) for s in sites}, trajectory=trajectory, **RUN
    )  # fmt: skip
    assert torch.equal(found.output, native())
    assert all(each.calls == 2 for each in found.firing)  # calls, or branches of the text encoder


def test_what_is_not_stitched_stays_to_the_bit() -> None:
    own = affine(BLOCK)
    pair = {BLOCK: (BLOCK, own)}
    plain = b().run(PROMPTS, record=Record(BLOCK, branch="cond"), **RUN)
    assert torch.equal(stitch(a(), b(), PROMPTS, pair, strength=0.0, **RUN).output, plain.output)
    found = stitch(
        a(), b(), PROMPTS, pair, strength=[0.0, 1.0, 1.0], steps=1, tokens=slice(0, 2),
        record=Record(BLOCK, branch="cond"), **RUN,
    )  # fmt: skip
    before, after = plain.cache[BLOCK].tensor, found.cache[BLOCK].tensor
    assert torch.equal(before[:, 0], after[:, 0])  # step
    assert torch.equal(before[0], after[0])  # row
    assert torch.equal(before[:, :, 2:], after[:, :, 2:])  # tokens
    assert not torch.equal(before[1:, 1, :2], after[1:, 1, :2])


def test_a_block_is_skipped_by_no_map_from_its_input_to_its_output() -> None:
    site = "unet.mid_block"
    found = stitch(a(), a(), PROMPTS, {site: (f"{site}:in", None)}, **RUN).output
    wanted = a().run(PROMPTS, edits=[Ablate(f"{site}:delta")], **RUN).output
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(found, native())


def test_a_recording_is_stitched_as_it_was() -> None:
    own = affine(BLOCK)
    cache_ = a().run(PROMPTS, record=BLOCK, **RUN).cache
    edit = Stitch(BLOCK, cache_[BLOCK], own, strength=0.5)
    plain = b().run(PROMPTS, record=BLOCK, **RUN).cache[BLOCK].tensor
    got = b().run(PROMPTS, edits=edit, record=BLOCK, **RUN).cache[BLOCK]
    mapped = cache_[BLOCK].tensor @ own.weight.T + own.bias
    order = [got.branches.index(name) for name in cache_[BLOCK].branches]
    wanted = 0.5 * plain + 0.5 * mapped[:, order]
    torch.testing.assert_close(got.tensor[:, :, 0], wanted[:, :, 0], rtol=1e-4, atol=1e-4)
    turned = Stitch(BLOCK, cache_[BLOCK], own, from_rows=[1, 2, 0])
    got = b().run(PROMPTS, edits=turned, record=BLOCK, **(RUN | {"batch_size": 2})).cache[BLOCK]
    torch.testing.assert_close(got.tensor, mapped[[1, 2, 0]][:, order], rtol=1e-4, atol=1e-4)


# schedules


def test_calls_without_a_partner_are_left_and_named() -> None:
    own = affine(BLOCK)
    pair = {BLOCK: (BLOCK, own)}
    more = {"source_arguments": {"num_inference_steps": 2}} | RUN | {"num_inference_steps": 4}
    with pytest.raises(InvalidInput, match="called 2 times, the target's 4 times"):
        stitch(a(), b(), PROMPTS, pair, **more)
    with pytest.raises(InvalidInput, match="one noise level, and schedule='noise'"):
        stitch(a(), b(), PROMPTS, pair, schedule="noise", **more)
    found = stitch(
        a(), b(), PROMPTS, pair, schedule="fraction", trajectory="own", record=BLOCK, **more
    )
    run = lock_step(
        a(), b(), PROMPTS, BLOCK, schedule="fraction", trajectory="own", **(more | {"seeds": SEEDS})
    )
    lacking = set(run.lacking)
    assert lacking and set(run.steps) | lacking == set(range(4)) and not set(run.steps) & lacking
    assert found.firing.notes[-1].startswith("steps ")
    assert "were not stitched: no call of the source belongs to them" in found.firing.notes[-1]
    assert set(found.firing[0].steps) == set(run.steps)


def test_calls_without_a_partner_in_a_step_of_two_evaluations_are_named() -> None:
    target = load("shapes-unet-b")
    target.subject.scheduler = HeunDiscreteScheduler.from_config(target.subject.scheduler.config)
    found = stitch(
        a(), target, PROMPTS[:1], {BLOCK: (BLOCK, affine(BLOCK))}, schedule="fraction",
        trajectory="own", **CALL,
    )  # fmt: skip
    note = "steps 0 were stitched in part: no call of the source belongs to some of their calls"
    assert found.firing.notes[-1] == note  # the last step has one evaluation


def test_stitches_of_text_encoders_refuse_what_stitches_of_denoisers_do() -> None:
    encoder = "text_encoder"
    run = partial(stitch, a(), b(), PROMPTS, {encoder: (encoder, None)}, **RUN)
    refused("unknown trajectory 'mine'", lambda: run(trajectory="mine"), UnknownName)
    refused("unknown schedule of stitches", lambda: run(schedule="mine"), UnknownName)
    refused("1 prompts of the source for 3", lambda: run(source_prompts=["a"]))
    refused("got an empty one", lambda: run(source_prompts=[]))
    other = {"negative_prompt": "a cat"}
    refused(
        "has negative_prompt 'a cat', which the source's text", lambda: run(target_arguments=other)
    )


def test_a_flow_model_gets_the_source_at_its_own_noise_on_its_own_grid() -> None:
    dit = model("shapes-dit")
    site, place = "unet.up_blocks.2", "transformer.transformer_blocks.3"
    x = widths(site)[0]
    own = AffineMap(torch.zeros(x), draw(128, x), draw(1, 128)[0])
    unet, scheduler = a().subject.unet, a().subject.scheduler
    embeds, negative = a().subject.encode_prompt(PROMPTS, "cpu", 1, True)
    states = torch.cat([negative, embeds])
    table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt().log()
    given: list[Tensor] = []

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        t = float(kwargs["timestep"][0]) / 1000
        ratio = t / (1 - t) if t < 1 else float("inf")
        scale = (1 + ratio**2) ** -0.5 / (1 - t) if t < 1 else 1.0
        timestep = np.interp(np.log(ratio), table.numpy(), np.arange(1000))
        unet(kwargs["hidden_states"] * scale, torch.tensor(timestep).float(), states)

    def keep(module: Any, args: Any, out: Tensor) -> None:
        given.append(torch.nn.functional.avg_pool2d(out, 2).flatten(2).mT)

    def replace(module: Any, args: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return out[0], given.pop() @ own.weight.T + own.bias

    run = RUN | {"num_inference_steps": 3}  # one call amid noise, where scales differ
    blocks = dit.subject.transformer.transformer_blocks
    hooks = [
        dit.subject.transformer.register_forward_pre_hook(begin, with_kwargs=True),
        unet.up_blocks[2].register_forward_hook(keep),
        blocks[3].register_forward_hook(replace),
    ]
    try:
        with torch.no_grad():
            drawn = [torch.Generator().manual_seed(seed) for seed in SEEDS]
            arguments = {k: v for k, v in run.items() if k not in ("progress", "seeds")}
            wanted = dit.subject(PROMPTS, generator=drawn, **arguments).images
    finally:
        for hook in hooks:
            hook.remove()
    pair = {place: (site, own)}
    got = stitch(a(), dit, PROMPTS, pair, schedule="target", **run)
    torch.testing.assert_close(got.output, wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(InvalidInput, match="call 0 has noise"):
        stitch(a(), dit, PROMPTS, pair, **RUN)


# language models


def small() -> Reader:
    return _gpt2(24, 1)


@cache
def _gpt2(width: int, seed: int) -> Reader:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tokenizers.byte_level()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=width, n_layer=2, n_head=2, n_positions=128,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Reader(GPT2LMHeadModel(config).eval(), tokenizer)


@cache
def large() -> Reader:
    return Reader(*tiny.language_model("gemma2"))


TEXTS = ["a red cat on a tree", "the blue house, well-known"]


def logits_by_hooks(
    readers: tuple[Reader, Reader],
    paths: tuple[str, str],
    text: str,
    own: AffineMap,
    pairs: list[tuple[int, int]],
) -> Tensor:
    """Logits of the target for one text, tokens of pairs (source, target) replaced."""
    kept: list[Tensor] = []

    def first(out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    def replace(module: Any, args: Any, out: Any) -> Any:
        y = first(out).clone()
        for one, two in pairs:
            y[0, two] = own.weight @ kept[0][0, one] + own.bias
        return (y, *out[1:]) if isinstance(out, tuple) else y

    hooks = [
        readers[0]
        .subject.get_submodule(paths[0])
        .register_forward_hook(lambda m, i, out: kept.append(first(out))),
        readers[1].subject.get_submodule(paths[1]).register_forward_hook(replace),
    ]
    with torch.no_grad():
        _, found = (
            reader.subject(torch.tensor([reader.tokenizer(text).input_ids])) for reader in readers
        )
    for hook in hooks:
        hook.remove()
    return found.logits[0]


def test_language_models_are_stitched_token_by_token() -> None:
    readers, paths = (small(), _gpt2(32, 2)), ("transformer.h.0", "transformer.h.1")
    own = AffineMap(torch.zeros(24), draw(32, 24), draw(1, 32)[0])
    found = stitch(*readers, TEXTS, {paths[1]: (paths[0], own)}, progress=False)
    for row, text in enumerate(TEXTS):
        count = len(readers[0].tokenizer(text).input_ids)
        wanted = logits_by_hooks(readers, paths, text, own, [(n, n) for n in range(count)])
        got = found.output.logits[row, -count:]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    told = stitch(
        *readers, TEXTS, {paths[1]: (paths[0], own)}, progress=False, max_new_tokens=3,
        do_sample=False,
    )  # fmt: skip
    assert told.text is not None and set(told.firing[0].steps) == {0}


def test_tokenizers_that_cut_otherwise_are_stitched_at_the_ends_of_pieces() -> None:
    from dreamreader.recording import record_between

    readers, paths = (small(), large()), ("transformer.h.0", "model.layers.1")
    own = AffineMap(torch.zeros(24), draw(32, 24), draw(1, 32)[0])
    pair = {paths[1]: (paths[0], own)}
    with pytest.raises(InvalidInput, match="choose align='spans'"):
        stitch(*readers, TEXTS, pair, progress=False)
    found = stitch(*readers, TEXTS, pair, align="spans", progress=False)
    both = record_between(*readers, TEXTS, *paths, align="spans", progress=False)
    assert both.positions is not None
    for row, text in enumerate(TEXTS):
        pairs = [
            (int(x), int(y))
            for x, y in zip(*(p[row] for p in both.positions), strict=True)
            if x >= 0
        ]
        count = len(readers[1].tokenizer(text).input_ids)
        assert 2 < len(pairs) < count
        wanted = logits_by_hooks(readers, paths, text, own, pairs)
        got = found.output.logits[row, -count:]
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


# bad input


class Loose:
    """A source of rows and branches that do not fit."""

    def donate(self, place: Any) -> Donation:
        return Donation(torch.zeros(2, 3, place.tokens, 96))


def refused(text: str, call: Callable[[], Any], kind: type[Exception] = InvalidInput) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_maps_at_wrong_sites_widths_and_directions_are_refused() -> None:
    own = affine(BLOCK)
    run = partial(stitch, a(), b(), PROMPTS, **RUN)
    refused(r"has 80 features, the source 96; a map has to", lambda: run({BLOCK: (BLOCK, None)}))
    back = AffineMap(torch.zeros(80), draw(96, 80), torch.zeros(96))
    refused("the site has 80 features, the map gives 96", lambda: run({BLOCK: (BLOCK, back)}))
    far = AffineMap(torch.zeros(40), draw(80, 40), torch.zeros(80))
    refused(r"x must be \[\.\.\., 40\], got", lambda: run({BLOCK: (BLOCK, far)}))
    carded = own.with_card(source_site="unet.mid_block", target_site=BLOCK)
    refused(f"is stitched from {BLOCK} to {BLOCK}; fit one", lambda: run({BLOCK: (BLOCK, carded)}))
    turned = own.with_card(source_site=BLOCK, target_site="unet.mid_block")
    refused("that is the other way round", lambda: run({BLOCK: ("unet.mid_block", turned)}))
    elsewhere = own.with_card(target_site="unet.mid_block")
    given = a().run(PROMPTS, record=BLOCK, **RUN).cache[BLOCK]
    edit = Stitch(BLOCK, given, elsewhere)
    refused("the map leads to unet.mid_block; stitch it", lambda: b().run(PROMPTS, edit, **RUN))


def test_what_does_not_belong_together_is_refused() -> None:
    own = affine(BLOCK)
    pair = {BLOCK: (BLOCK, own)}
    run = partial(stitch, a(), b(), PROMPTS, **RUN)
    refused("give sites", lambda: run({}))
    refused(r"needs \(source site, map\)", lambda: run({BLOCK: BLOCK}))
    refused("needs a map of dreamreader.mapping or None, got int", lambda: run({BLOCK: (BLOCK, 3)}))
    refused("not both in a denoiser", lambda: run({"text_encoder": (BLOCK, own)}))
    refused("unknown trajectory .mine.; nearest", lambda: run(pair, trajectory="mine"), UnknownName)
    other = {"transformer.h.0": (BLOCK, None)}
    refused("have no common number", lambda: stitch(a(), small(), TEXTS, other, progress=False))
    words = {"transformer.h.1": ("transformer.h.0", None)}
    refused("only the prompt of a language model is stitched", lambda: stitch(
        small(), _gpt2(32, 2), TEXTS, words, steps=2, progress=False))  # fmt: skip
    refused("unet.up_blocks.* stands for 4 sites", lambda: run({"unet.up_blocks.*": (BLOCK, own)}))
    refused("selects none of the 2 steps", lambda: run(pair, steps=[]))
    refused(
        "load the model twice", lambda: lock_step(a(), Reader(a().subject), PROMPTS, BLOCK, **CALL)
    )
    alone = {"source_arguments": {"guidance_scale": 1.0}}
    refused("the source ran the branches cond, uncond is stitched too", lambda: run(pair, **alone))
    assert run(pair, branch="cond", **alone).firing[0].calls == 2
    refused("1 prompts of the source for 3", lambda: run(pair, source_prompts=["a"]))
    refused("prompts is a list of strings, got 'a'", lambda: lock_step(a(), b(), "a", BLOCK))
    refused("got an empty one", lambda: stitch(a(), b(), [], pair))
    refused(
        "batch_size is a whole number of at", lambda: stitch(a(), b(), ["a"], pair, batch_size=0)
    )
    refused("stitch: steps must be a number, slice", lambda: run(pair, steps="x"))
    refused("has not run before it in the same call", lambda: stitch(
        a(), a(), PROMPTS, {"unet.mid_block:in": ("unet.mid_block", None)}, **RUN))  # fmt: skip
    levels = NoiseConditionedMap(
        torch.zeros(96), draw(160, 96).reshape(2, 80, 96), torch.zeros(2, 80), 0.0, 1.0
    )
    given = a().run(PROMPTS, record=BLOCK, **RUN).cache
    refused("depends on the noise; give level", lambda: b().run(
        PROMPTS, Stitch(BLOCK, given[BLOCK], levels), **RUN))  # fmt: skip
    told = Stitch(BLOCK, given[BLOCK], levels, levels=[9.0, 1.0])
    assert b().run(PROMPTS, told, **RUN).firing[0].calls == 2
    refused("has 2 rows in 3 branches for 3 rows in 2", lambda: b().run(
        PROMPTS, Stitch(BLOCK, Loose(), own), **RUN))  # fmt: skip
    refused("3 levels for the 2 steps", lambda: Stitch(BLOCK, given[BLOCK], levels=[1.0] * 3))
    refused("of a Cache give one site", lambda: Stitch(BLOCK, given))
    refused("has 3 rows, the run 2", lambda: b().run(
        PROMPTS[:2], Stitch(BLOCK, given[BLOCK], own), **(RUN | {"seeds": [3, 4]})))  # fmt: skip
    more = RUN | {"num_inference_steps": 3}
    refused("has no step 2", lambda: b().run(PROMPTS, Stitch(BLOCK, given[BLOCK], own), **more))
    step = lock_step(a(), b(), PROMPTS, BLOCK, **RUN)
    loose = Stitch(BLOCK, step.at(BLOCK), own)
    refused(r"run it within follow\(\)", lambda: b().run(PROMPTS, loose, **RUN))
    refused("site of the source in lock-step", lambda: step.at("unet.mid_block"), UnknownName)
