"""Each loss by hand, going down on tiny models, and with gradients to all parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from reft.subjects import BASE, LAYER, SITES, TEACHER, language, pairs, pipeline, settings
from torch.nn import functional as F

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.reft import (
    ActivationMatch,
    Batch,
    Denoising,
    LanguageKeep,
    LanguageLoss,
    Loss,
    NoiseMatch,
    Pairs,
    Reft,
    Together,
    encode_images,
    keep_activations,
    record_calls,
    record_pairs,
    train,
)

BATCH = Batch(torch.tensor([0, 2, 1]), torch.tensor([0, 1, 2]), 5)
FIRST = Batch(torch.tensor([0, 1]), torch.tensor([0, 0]), 5)
PROMPTS, COMPLETIONS = ["a red cat", "the dog"], [" sleeps now", " eats"]


def calls(prompts: list[str]) -> Any:
    return record_calls(pipeline(), prompts, **settings())


def noise_match() -> Loss:
    return NoiseMatch(pipeline(), calls(BASE), calls(TEACHER))


def denoising() -> Loss:
    pictures = torch.rand(4, 3, 16, 24)
    return Denoising(pipeline(), calls(BASE), encode_images(pipeline(), pictures))


def with_keep() -> Loss:
    main = ActivationMatch(pairs())
    same = record_pairs(pipeline(), ["a house"], ["a house"], SITES, **settings())
    return Together(main, keep_activations(same, main), 0.5)


def language_loss() -> Loss:
    return LanguageLoss(language(), PROMPTS, COMPLETIONS)


def language_with_keep() -> Loss:
    return Together(language_loss(), LanguageKeep(language(), ["a blue tree", "dogs"]))


LOSSES: list[tuple[Callable[[], Loss], float]] = [
    (lambda: ActivationMatch(pairs()), 0.9),
    (noise_match, 0.8),
    (denoising, 0.99),
    (with_keep, 0.99),
    (language_loss, 0.8),
    (language_with_keep, 0.9),
]
each_loss = pytest.mark.parametrize(
    ("make", "falls_to"),
    LOSSES,
    ids=["activations", "noise", "denoising", "with keep", "language", "language with keep"],
)


def made(loss: Loss, **kw: Any) -> Reft:
    if isinstance(getattr(loss, "main", loss), LanguageLoss):
        return Reft.for_sites(language(), LAYER, 4, **kw)
    return Reft.for_sites(pipeline(), SITES, 4, **settings(), **kw)


@each_loss
def test_it_goes_down(make: Callable[[], Loss], falls_to: float):
    loss = make()
    reft = made(loss)
    rows = torch.arange(loss.rows)
    batch = Batch(rows, rows % loss.moments, 5)

    def value() -> float:
        with torch.no_grad():
            return float(sum(loss.terms(reft, batch).values()))

    before = value()
    train(reft, loss, steps=20, lr=0.03, batch_size=6)
    assert value() < falls_to * before


@each_loss
def test_gradients_reach_all_parameters_and_none_of_the_model(
    make: Callable[[], Loss], falls_to: float
):
    loss = make()
    reft = made(loss, init="pyreft")
    model = language() if isinstance(getattr(loss, "main", loss), LanguageLoss) else pipeline()
    weights = [p for part in model._subject.components().values() for p in part.parameters()]
    before = [each.requires_grad for each in weights]
    learning = [number % 3 > 0 for number in range(len(weights))]
    try:
        for each, learns in zip(weights, learning, strict=True):
            each.requires_grad_(learns)
        with loss.ready():
            torch.stack(list(loss.terms(reft, FIRST).values())).sum().backward()
        assert [each.requires_grad for each in weights] == learning
        with pytest.raises(KeyboardInterrupt), loss.ready():
            raise KeyboardInterrupt
        assert [each.requires_grad for each in weights] == learning
    finally:
        for each, learns in zip(weights, before, strict=True):
            each.requires_grad_(learns)
    for name, each in reft.named_parameters():
        assert each.grad is not None and float(each.grad.abs().max()) > 0, name
    assert all(each.grad is None for each in weights)


def test_activations_by_hand():
    reft, found = Reft.for_sites(pipeline(), SITES, 4, init="pyreft", **settings()), pairs()
    for site, value in ActivationMatch(found).terms(reft, BATCH).items():
        base, teacher = (
            torch.stack([each[site][row, call] for row, call in ((0, 0), (2, 1), (1, 2))])
            for each in (found.base, found.teacher)
        )
        wanted = (reft.adapters[site](base) - teacher).square().mean()
        wanted = wanted / (found.base[site] - found.teacher[site]).square().mean()
        torch.testing.assert_close(value, wanted)


def test_without_an_edit_activations_and_what_is_kept_are_one_and_zero():
    reft, loss = Reft.for_sites(pipeline(), SITES, 4, **settings()), with_keep()
    rows = torch.arange(4).repeat_interleave(3)
    terms = loss.terms(reft, Batch(rows, torch.arange(3).repeat(4), 5))
    for site in SITES:
        assert float(terms[site].detach()) == pytest.approx(1, rel=1e-4)
        assert float(terms[f"keep {site}"].detach()) == 0


def test_predictions_by_hand_with_an_adapter_for_each_step():
    base, teacher = calls(BASE), calls(TEACHER)
    reft = Reft.for_sites(pipeline(), SITES, 4, per_step=3, init="pyreft", **settings())
    found = NoiseMatch(pipeline(), base, teacher).terms(reft, BATCH)["noise"]
    apart = []
    for row, call in zip(BATCH.rows, BATCH.moments, strict=True):
        one = row[None], call[None]
        with torch.no_grad():
            wanted = teacher(*one, base.latents[one])
            with pipeline().editing(reft.edits(at=[int(call)])):
                apart.append((base(*one) - wanted).square().mean())
    torch.testing.assert_close(found.detach(), torch.stack(apart).mean(), rtol=1e-4, atol=1e-6)


def test_a_target_has_the_same_bits_whatever_came_before_it():
    base, teacher = calls(BASE), calls(TEACHER)
    reft = Reft.for_sites(pipeline(), SITES, 4, **settings())
    used, fresh = (NoiseMatch(pipeline(), base, teacher) for _ in range(2))
    every = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    for row, moment in zip(*every, strict=True):
        used.terms(reft, Batch(row[None], moment[None], 0))
    whole = Batch(*every, 0)
    assert torch.equal(used.terms(reft, whole)["noise"], fresh.terms(reft, whole)["noise"])


def test_the_same_prompt_is_kept_at_zero():
    reft, own = Reft.for_sites(pipeline(), SITES, 4, **settings()), calls(BASE)
    assert float(NoiseMatch(pipeline(), own, own).terms(reft, BATCH)["noise"].detach()) < 1e-10


@pytest.mark.parametrize(
    ("name", "scheduler", "kind"),
    [
        ("sd", "DDIMScheduler", "epsilon"),
        ("sd", "DDIMScheduler", "v_prediction"),
        ("sd", "EulerDiscreteScheduler", "epsilon"),
        ("sd3", None, "flow"),
    ],
    ids=["ddim epsilon", "ddim v", "euler epsilon", "flow"],
)
def test_noised_pictures_are_those_of_the_scheduler(name: str, scheduler: str | None, kind: str):
    import diffusers

    pipe = tiny.pipeline(name)
    if scheduler is not None:
        made = getattr(diffusers, scheduler)
        pipe.scheduler = made.from_config(pipe.scheduler.config, prediction_type=kind)
    reader, asked = Reader(pipe), tiny.arguments(name, 3)
    found = record_calls(reader, ["a cat", "a dog", "a tree"], **asked)
    x_0 = torch.randn(found.latents[:, 0].shape)
    loss = Denoising(reader, found, x_0)
    assert loss.kind == kind
    noise = torch.randn(x_0.shape, generator=BATCH.generator)
    rows, kept = BATCH.rows, pipe.scheduler
    times = torch.tensor([found.moments[each].timestep for each in BATCH.moments])
    target = noise
    if kind == "flow":
        x_t = kept.scale_noise(x_0[rows], times, noise)
        target = noise - x_0[rows]
    else:
        times = times if scheduler == "EulerDiscreteScheduler" else times.long()
        x_t = kept.add_noise(x_0[rows], noise, times)
        if kind == "v_prediction":
            target = kept.get_velocity(x_0[rows], noise, times)
    if scheduler == "EulerDiscreteScheduler":
        levels = torch.tensor([found.moments[each].sigma for each in BATCH.moments])
        x_t = x_t / (levels.reshape(-1, 1, 1, 1) ** 2 + 1).sqrt()
    with torch.no_grad():
        wanted = (found(rows, BATCH.moments, x_t) - target).square().mean()
    site = SITES[1] if name == "sd" else "transformer.transformer_blocks.0.attn"
    reft = Reft.for_sites(reader, site, 2, **asked)
    value = loss.terms(reft, BATCH)["denoising"].detach()
    torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


def test_pictures_come_back_from_their_latents_as_the_autoencoder_gives_them():
    vae, pictures = pipeline().subject.vae, torch.rand(2, 3, 16, 16)
    latents = encode_images(pipeline(), pictures, batch_size=1)
    with torch.no_grad():
        wanted = vae.encode(2 * pictures - 1).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(latents, wanted)


def test_an_autoencoder_that_normalises_channels_is_refused():
    pipe = tiny.pipeline("sd")
    pipe.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[2.0] * 4)
    with pytest.raises(InvalidInput, match="how AutoencoderKL scales latents is not known"):
        encode_images(Reader(pipe), torch.rand(1, 3, 16, 16))


def test_the_loss_of_completions_by_hand():
    reader = language()
    reft = Reft.for_sites(reader, LAYER, 4, init="pyreft", tokens=[0, -1])
    found = LanguageLoss(reader, PROMPTS, COMPLETIONS).terms(reft, FIRST)
    adapter, losses = reft.adapters[LAYER], []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        head = reader.tokenizer(prompt).input_ids
        tail = reader.tokenizer(completion, add_special_tokens=False).input_ids
        tail = [*tail, reader.tokenizer.eos_token_id]

        def edit(module: Any, args: Any, out: Any, last: int = len(head) - 1) -> Any:
            h = out if isinstance(out, torch.Tensor) else out[0]
            h = h.clone()
            h[:, [0, last]] = adapter(h[:, [0, last]])
            return h if isinstance(out, torch.Tensor) else (h, *out[1:])

        handle = reader.subject.get_submodule(LAYER).register_forward_hook(edit)
        ids = torch.tensor([[*head, *tail]])
        logits = reader.subject(ids).logits[0, len(head) - 1 : -1]
        handle.remove()
        losses.append(F.cross_entropy(logits, torch.tensor(tail), reduction="none"))
    torch.testing.assert_close(found["language"], torch.cat(losses).mean(), rtol=1e-4, atol=1e-5)


def test_what_a_language_model_keeps_is_a_divergence():
    reader = language()
    keep = LanguageKeep(reader, ["a red cat", "the dog is here"])
    same = keep.terms(Reft.for_sites(reader, LAYER, 4), FIRST)["language"]
    assert float(same.detach()) == pytest.approx(0, abs=1e-6)
    reft = Reft.for_sites(reader, LAYER, 4, init="pyreft")
    found, apart = keep.terms(reft, FIRST)["language"], []
    for prompt in ("a red cat", "the dog is here"):
        ids = torch.tensor([reader.tokenizer(prompt).input_ids])
        before = reader.subject(ids).logits[0].softmax(-1)
        with reader.editing(reft.edits()):
            after = reader.subject(ids).logits[0].log_softmax(-1)
        apart.append((before * (before.log() - after)).sum(-1))
    torch.testing.assert_close(
        found.detach(), torch.cat(apart).detach().mean(), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: ActivationMatch(Pairs(pairs().base, pairs().base, None)),
            "base and teacher have the same activations, there is nothing to learn",
        ),
        (
            lambda: ActivationMatch(pairs()).terms(Reft({"0": 4}, 2), BATCH),
            "0: there are no activations of this site; recorded are unet.down_blocks",
        ),
        (
            lambda: NoiseMatch(pipeline(), calls(BASE), calls(TEACHER[:3])),
            "base has 4 rows of 3 calls, the teacher 3 of 3",
        ),
        (
            lambda: Denoising(pipeline(), calls(BASE), torch.zeros(4, 4, 8, 8)),
            r"pictures must be latents \[4, 4, 8, 12\], as the denoiser has them, got \[4, 4, 8",
        ),
        (
            lambda: encode_images(pipeline(), torch.full((1, 3, 16, 16), 2.0)),
            "pictures must be .* from 0 to 1",
        ),
        (
            lambda: LanguageLoss(language(), PROMPTS, COMPLETIONS[:1]),
            "every prompt needs a completion: got 2 and 1",
        ),
        (
            lambda: LanguageLoss(pipeline(), PROMPTS, COMPLETIONS),
            "the loss of a language model needs one, with its tokenizer",
        ),
        (
            lambda: language_loss().terms(Reft({LAYER: 32}, 2, steps=3), FIRST),
            "a language model has no denoising steps: train without per_step",
        ),
        (
            lambda: language_loss().terms(Reft({LAYER: 32}, 2, tokens="cat"), FIRST),
            "tokens='cat': words are not told apart from those of completions",
        ),
        (lambda: Together(language_loss(), language_loss(), 0), "must be above 0, got 0"),
    ],
    ids=[
        "same",
        "site",
        "rows",
        "latents",
        "pictures",
        "completions",
        "no language model",
        "steps",
        "word",
        "weight",
    ],
)
def test_wrong_inputs_say_what_is_wrong(make: Callable[[], Any], text: str):
    with pytest.raises(InvalidInput, match=text):
        make()
