"""Guidance of latents against gradients through the whole denoiser, taken by hand."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import dreamreader as dr
from dreamreader.engine._clock import DenoiserCall
from dreamreader.errors import InvalidInput, NeverFired, UnknownName
from dreamreader.probes import Probe, fit, latent_guidance
from dreamreader.probes.latent_guidance import _LatentGuide
from dreamreader.probes.prediction import weight

SITES = {
    "sd": "unet.mid_block.attentions.0.transformer_blocks.0.attn2",
    "sd3": "transformer.transformer_blocks.0.attn",
}
PROMPTS = ["a red cat", "two small houses"]


def _pipe(family: str = "sd", solver: str | None = None, **config: Any) -> Any:
    import diffusers

    pipe = tiny.pipeline(family)
    if solver:
        pipe.scheduler = getattr(diffusers, solver).from_config(pipe.scheduler.config, **config)
    return pipe


def _run(reader: dr.Reader, rows: slice = slice(None), **more: Any) -> Any:
    settings = {"num_inference_steps": 4, "height": 16, "width": 16, "output_type": "latent"}
    if "max_sequence_length" in tiny.arguments("sd3") and "Diffusion3" in reader._subject.name:
        settings["max_sequence_length"] = 16
    return reader.run(
        PROMPTS[rows], seeds=[3, 4][rows], guidance_scale=5.0, **settings | more
    )  # fmt: skip


def _probe(site: str = SITES["sd"], width: int = 32, **more: Any) -> Probe:
    """A probe for rows that nothing was learnt from: its gradients are what matters here."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(60, width, generator=g)
    settings = {"classes": ("a", "b", "c"), "hidden": (8,), "epochs": 2, "controls": False, **more}
    return fit({site: rows}, torch.arange(60) % 3, **settings)


@contextmanager
def _watched(pipe: Any, denoiser: Any) -> Iterator[tuple[list, list]]:
    """Arguments of the denoiser and predictions given to the scheduler, step by step."""
    calls, predictions = [], []
    original = pipe.scheduler.step

    def step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        predictions.append(model_output.clone())
        return original(model_output, *args, **kwargs)

    pipe.scheduler.step = step
    hook = denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        yield calls, predictions
    finally:
        hook.remove()
        del pipe.scheduler.step


def _by_hand(pipe: Any, call: tuple, site: str, climb: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient of climb(values of the cond rows) with respect to their latents."""
    name, path = site.split(".", 1)
    denoiser = getattr(pipe, name)
    args, kwargs = call
    x = (args[0] if args else kwargs["hidden_states"]).detach().clone().requires_grad_()
    given = ((x, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": x})
    seen = []
    hook = denoiser.get_submodule(path).register_forward_hook(lambda m, i, o: seen.append(o))
    denoiser(*given[0], **given[1])
    hook.remove()
    h = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    (grad,) = torch.autograd.grad(climb(h[len(h) // 2 :]), x)
    return grad[len(grad) // 2 :]


CASES = [
    ("sd", "DDIMScheduler", "epsilon"),
    ("sd", "DDIMScheduler", "v_prediction"),
    ("sd", "DDIMScheduler", "sample"),
    ("sd", "EulerDiscreteScheduler", "epsilon"),
    ("sd", "EulerDiscreteScheduler", "v_prediction"),
    ("sd3", None, "flow"),
]


@pytest.mark.parametrize("family, solver, kind", CASES, ids=lambda each: str(each))
def test_the_change_is_the_gradient_through_the_whole_denoiser(
    family: str, solver: str | None, kind: str
):
    config = {} if kind == "flow" else {"prediction_type": kind}
    pipe, site = _pipe(family, solver, **config), SITES[family]
    reader, denoiser = dr.Reader(pipe), getattr(pipe, site.split(".")[0])
    width = _run(reader, record=site).cache[site].shape[-1]
    probe = _probe(site, width)
    scales, targets = [3.0, 7.0], torch.tensor([0, 2])

    with _watched(pipe, denoiser) as (calls, plain):
        _run(reader)
    with (
        _watched(pipe, denoiser) as (_, guided),
        latent_guidance(reader, probe, target=["a", "c"], scale=scales, steps=[1]) as found,
    ):
        _run(reader)

    def log_probability(h: Tensor) -> Tensor:
        logits = probe.mlps[0].logits(h.mean(1)) / probe.temperature[0, 0]
        return logits.log_softmax(-1)[torch.arange(2), targets].sum()

    grad = _by_hand(pipe, calls[1], site, log_probability)
    schedule = pipe.scheduler
    if kind == "flow":
        sigma = float(schedule.sigmas[1])
        alpha = 1 - sigma
    else:
        abar = float(schedule.alphas_cumprod[int(schedule.timesteps[1])])
        alpha, sigma = abar**0.5, (1 - abar) ** 0.5
    change = -sigma * torch.tensor(scales)[:, None, None, None] * grad  # of the predicted noise
    change = {
        "epsilon": change,
        "v_prediction": change / alpha,
        "sample": -sigma * change / alpha,
        "flow": change / (1 - sigma),
    }[kind]
    assert torch.equal(guided[0], plain[0]) and list(found.value) == [1]
    assert float(change.abs().max()) > 1e-4
    error = (guided[1] - plain[1] - change).abs().max()
    assert float(error) < 1e-3 * float(change.abs().max()) + 1e-6
    assert torch.allclose(found.gradient[1], grad.flatten(1).norm(dim=1), rtol=1e-3)


def _moment(sigma: float) -> DenoiserCall:
    return DenoiserCall(1, 500.0, sigma, 0.5, 0, ("cond",))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_weight_turns_a_mixture_into_one_of_its_parts(kind: str):
    """Two Gaussians: what is predicted of one of them, from the mixture's and log p(y | x)."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    alpha, sigma, spread = 0.6, 0.8, 0.5
    means, x = torch.tensor([-1.0, 2.0], dtype=torch.float64), torch.tensor(0.7).double()
    if kind == "flow":
        alpha = 0.2
        scheduler, moment = FlowMatchEulerDiscreteScheduler(), _moment(sigma)
    else:
        scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
        moment = _moment(sigma / alpha)
    variance = alpha**2 * spread**2 + sigma**2

    def likelihood(x: Tensor) -> Tensor:
        return torch.exp(-((x - alpha * means) ** 2) / (2 * variance))

    noise = sigma * (x - alpha * means) / variance  # E[eps | x, y]
    clean = means + alpha * spread**2 * (x - alpha * means) / variance  # E[x_0 | x, y]
    each = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * clean,
        "sample": clean,
        "flow": noise - clean,
    }[kind]
    share = likelihood(x) / likelihood(x).sum()
    leaf = x.clone().requires_grad_()
    told = torch.log(likelihood(leaf)[1] / likelihood(leaf).sum())
    (grad,) = torch.autograd.grad(told, leaf)
    w = weight(scheduler, moment)
    assert w is not None
    assert float((share * each).sum() + w * grad) == pytest.approx(float(each[1]), rel=1e-9)


def test_pure_noise_and_unknown_predictions():
    from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

    assert weight(FlowMatchEulerDiscreteScheduler(), _moment(1.0)) is None
    assert weight(DDIMScheduler(prediction_type="v_prediction"), _moment(math.inf)) is None
    assert weight(DDIMScheduler(), _moment(math.inf)) == -1.0
    with pytest.raises(InvalidInput, match="what EDMEulerScheduler predicts .* is not known"):
        weight(EDMEulerScheduler(), _moment(1.0))
    # Diffusers' own needs torchsde; it scales its inputs as the EDM schedulers do.
    cosine = type("CosineDPMSolverMultistepScheduler", (DDIMScheduler,), {})
    with pytest.raises(InvalidInput, match="what CosineDPMSolver.* predicts .* is not known"):
        weight(cosine(prediction_type="v_prediction"), _moment(1.0))


def test_scale_zero_is_bit_equal_and_rows_are_apart():
    reader, probe = dr.Reader(_pipe()), _probe()
    plain = _run(reader).images
    with latent_guidance(reader, probe, target="a", scale=0.0):
        assert torch.equal(_run(reader).images, plain)
    with latent_guidance(reader, probe, target=["a", "b"], scale=[0.0, 30.0]):
        both = _run(reader).images
    assert torch.equal(both[0], plain[0]) and not torch.allclose(both[1], plain[1], atol=1e-3)
    with latent_guidance(reader, probe, target="b", scale=30.0):
        alone = _run(reader, slice(1, 2)).images
    assert torch.allclose(alone[0], both[1], atol=1e-4)


def test_a_row_of_scale_zero_hears_nothing_of_its_gradient():
    given = "a", None, [0.0, 2.0], "logits", None, None, False
    guide = _LatentGuide(dr.Reader(_pipe()), _probe(), *given)
    guide.change = _moment(1.0), torch.tensor([[math.nan], [3.0]])
    left, moved = guide.take_change(torch.tensor([[-0.0], [1.0]])).flatten().tolist()
    assert math.copysign(1.0, left) == -1.0 and left == 0.0 and moved == 4.0
    guide.change = _moment(1.0), torch.ones(2, 1)
    with pytest.raises(InvalidInput, match=r"steps \[2, 3\], the denoiser has latents \[2, 1\]"):
        guide.take_change(torch.ones(2, 3))


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_checkpointing_changes_nothing_but_memory(family: str, monkeypatch: pytest.MonkeyPatch):
    import torch.utils.checkpoint

    pipe, site = _pipe(family), SITES[family]
    reader, denoiser = dr.Reader(pipe), getattr(pipe, site.split(".")[0])
    probe = _probe(site, _run(reader, record=site).cache[site].shape[-1])
    parts, original = [], torch.utils.checkpoint.checkpoint
    before = [dict(vars(each)) for each in denoiser.modules()]

    def counted(*args: Any, **kwargs: Any) -> Any:
        parts.append(args[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    images = []
    for checkpoint in (False, True):
        with latent_guidance(reader, probe, "a", scale=9.0, checkpoint=checkpoint) as found:
            images.append(_run(reader).images)
        assert bool(parts) is checkpoint and len(found.value) == (3 if family == "sd3" else 4)
    assert torch.equal(*images)
    assert list(found.skipped) == ([0] if family == "sd3" else [])
    after = [dict(vars(each)) for each in denoiser.modules()]
    assert after == before


def test_nothing_is_left_behind_also_after_an_exception():
    pipe = _pipe()
    reader, probe = dr.Reader(pipe), _probe()
    modes = []

    def broken(*_: Any) -> dict:
        modes.append(torch.is_grad_enabled())
        if len(modes) == 3:
            raise RuntimeError("stop here")
        return {}

    asked = [each.requires_grad for each in pipe.unet.parameters()]
    with pytest.raises(RuntimeError, match="stop here"):
        with latent_guidance(reader, probe, "a", scale=9.0):
            _run(reader, callback_on_step_end=broken)
    assert modes == [False] * 3 and torch.is_grad_enabled()
    assert [each.requires_grad for each in pipe.unet.parameters()] == asked
    assert all(each.grad is None for each in pipe.unet.parameters())
    for each in pipe.unet.modules():
        assert not each._forward_hooks and not each._forward_pre_hooks
    assert "step" not in vars(pipe.scheduler) and not reader._subject.rehearsing


def test_edits_take_part_and_recordings_hear_of_one_evaluation():
    pipe = _pipe()
    reader, probe, site = dr.Reader(pipe), _probe(), SITES["sd"]
    push = dr.Steer("unet.down_blocks.0", torch.ones(16), alpha=2.0)
    probs = site + ":probs"
    with latent_guidance(reader, probe, "a", scale=0.0):
        plain = _run(reader, edits=push, record=[site, probs])
    with latent_guidance(reader, probe, "a", scale=9.0, steps=[0]) as found:
        guided = _run(reader, edits=push, record=[site, probs])
    with latent_guidance(reader, probe, "a", scale=9.0, steps=[0]) as unedited:
        _run(reader)
    assert guided.cache[site].shape == plain.cache[site].shape
    assert guided.cache[probs].shape == plain.cache[probs].shape
    assert repr(guided.firing) == repr(plain.firing)
    cond = plain.cache[site].select(branch="cond", step=0).tensor[:, 0].mean(1)
    told = (probe.logits(cond) / probe.temperature[0, 0]).log_softmax(-1)[:, 0]
    assert torch.allclose(found.value[0], told, atol=1e-5)  # of the edited denoiser
    assert not torch.allclose(found.value[0], unedited.value[0], atol=1e-4)


def test_objectives_by_hand():
    from dreamreader.probes.objectives import label_targets, objective_values

    classes = {"color": ("r", "g", "b"), "odd": ("n", "y")}
    rows, y = torch.randn(60, 4), torch.arange(60)
    labels = {"color": y % 3, "odd": y % 2}
    z = torch.tensor([[1.0, 2.0, 0.5, 0.3, -0.4]])
    for loss in ("softmax", "sigmoid"):
        probe = fit(rows, labels, classes=classes, loss=loss, epochs=1, controls=False)
        heat = probe.temperature[0]
        p = torch.cat([
            (each / t).softmax(-1) if loss == "softmax" else (each / t).sigmoid()
            for each, t in zip((z[0, :3], z[0, 3:]), heat, strict=True)
        ])  # fmt: skip
        found = objective_values(
            probe, 0, z, *label_targets(probe, {"color=r", "odd=y"}, None), "probability"
        )
        assert float(found) == pytest.approx(float(torch.log(p[0]) + torch.log(p[4])), rel=1e-5)
        found = objective_values(
            probe, 0, z, *label_targets(probe, None, {"color=r", "color=b"}), "probability"
        )
        truth = torch.log(p[1]) if loss == "softmax" else torch.log((1 - p[0]) * (1 - p[2]))
        assert float(found) == pytest.approx(float(truth), rel=1e-5)
        sides = label_targets(probe, {"color=r", "odd=y"}, {"color=g"})
        assert float(objective_values(probe, 0, z, *sides, "logits")) == pytest.approx(0.3 - 2.0)
    sides = label_targets(probe, ["color=r", None], [None, "odd=n"])
    tokens = torch.stack([z, 2 * z], 1).expand(2, 2, 5)
    assert objective_values(probe, 0, tokens, *sides, "logits").tolist() == pytest.approx(
        [1.5, -0.45]
    )


def test_what_cannot_be_right_says_so():
    pipe = _pipe()
    reader, probe = dr.Reader(pipe), _probe()

    def refused(kind: type[Exception], message: str, run: bool = False, **given: Any) -> None:
        reading = given.pop("probe", probe)
        with pytest.raises(kind, match=message):
            with latent_guidance(reader, reading, **{"target": "a", **given}):
                if run:
                    _run(reader)

    refused(UnknownName, "unknown label of a probe 'z'", target="z")
    refused(InvalidInput, "row 1 has neither target nor avoid", target=["a", None])
    refused(InvalidInput, "target is for 2 rows, avoid for 3", target=["a"] * 2, avoid=["b"] * 3)
    refused(UnknownName, "objective of latent_guidance 'loss'", objective="loss")
    refused(InvalidInput, "vae.decoder is not inside the denoiser", site="vae.decoder")
    refused(UnknownName, "unknown", site="unet.nothing")
    refused(InvalidInput, "is not one whole site", site="unet.**.attn2")
    refused(InvalidInput, "it reads 7 features", run=True, probe=_probe(width=7))
    refused(InvalidInput, "labels for 3 rows, the pipeline runs 2", run=True, target=["a"] * 3)
    refused(InvalidInput, "scale for 3 rows, the pipeline runs 2", run=True, scale=[1.0] * 3)
    refused(NeverFired, r"no step was guided \(steps=\[9\] of 4\)", run=True, steps=[9])
    refused(NeverFired, r"no step was guided \(the denoiser did not run\)")
    refused(NeverFired, r"branch 'other' of uncond, cond", run=True, branch="other")
    rows = {SITES["sd"]: torch.randn(60, 32)}
    numbers = fit(rows, torch.rand(60), task="regress", epochs=1, controls=False)
    refused(InvalidInput, "a regression has no probabilities", probe=numbers, target="value")
    with pytest.raises(InvalidInput, match="needs a diffusers pipeline with a scheduler, got Line"):
        with latent_guidance(dr.Reader(torch.nn.Linear(2, 2)), probe, "a"):
            pass
    with pytest.raises(InvalidInput, match="needs gradients, which inference_mode has not"):
        with torch.inference_mode(), latent_guidance(reader, probe, "a"):
            _run(reader)
