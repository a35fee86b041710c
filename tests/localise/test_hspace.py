"""The asymmetric rule against loops written by hand, which share nothing with it but the models."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import dreamreader as dr
from dreamreader.errors import InvalidInput, NeverFired
from dreamreader.localise.hspace import asymmetric
from dreamreader.localise.hspace_twin import Twin

PROMPTS = ["a red cat", "two small houses"]
SITE = "unet.mid_block"
ALPHAS = [0.0, 3.0]
STEPS = range(1, 4)


def _pipe(solver: str = "DDIMScheduler", **config: Any) -> Any:
    import diffusers

    pipe = tiny.pipeline("sd")
    pipe.scheduler = getattr(diffusers, solver).from_config(pipe.scheduler.config, **config)
    return pipe


def _direction(width: int = 32) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(1))


def _call(pipe: Any, scale: float = 5.0, **more: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return pipe(
        PROMPTS, generator=generators, num_inference_steps=5, guidance_scale=scale, height=16,
        width=16, output_type="latent", **more,
    ).images  # fmt: skip


def _steer(alpha: Any = ALPHAS, **where: Any) -> Any:
    return dr.Steer(SITE, _direction(), alpha, **{"steps": STEPS, **where})


def _asymmetric(pipe: Any, edits: Any, boost: float | None = None, **more: Any) -> Tensor:
    with asymmetric(dr.Reader(pipe), edits, boost=boost):
        return _call(pipe, **more)


def _by_hand(
    pipe: Any,
    scale: float = 5.0,
    eta: float = 0.0,
    boost: float = -1.0,
    branch: str | None = None,
    both: bool = False,
    rescale: float = 0.0,
) -> Tensor:
    """Asyrp as a loop: noise level by noise level, from the schedule's own definition.

    both: the symmetric edit, which changes picture and direction alike.
    """
    guided = scale > 1
    cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, guided, [""] * 2 if guided else None)
    text = torch.cat([uncond, cond]) if guided else cond
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=each) for each in generators])
    pipe.scheduler.set_timesteps(5)
    kind = pipe.scheduler.config.prediction_type
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    push = torch.tensor(ALPHAS)[:, None, None, None] * _direction()[None, :, None, None]
    none = torch.zeros_like(push)
    parts = [none if branch == "cond" else push, none if branch == "uncond" else push]
    push = torch.cat(parts) if guided else push

    def predict(time: Tensor, edited: bool) -> Tensor:
        hook = pipe.unet.mid_block.register_forward_hook(lambda m, i, o: o + push if edited else o)
        batch = torch.cat([x, x]) if guided else x
        m = pipe.unet(batch, time, encoder_hidden_states=text).sample
        hook.remove()
        if guided:
            away, towards = m.chunk(2)
            m = away + scale * (towards - away)
            spread = [each.std((1, 2, 3), keepdim=True) for each in (towards, m)]
            m = rescale * m * spread[0] / spread[1] + (1 - rescale) * m
        return m.double()

    with torch.no_grad():
        for number, time in enumerate(pipe.scheduler.timesteps):
            a = kept[time]
            after = kept[time - 200] if time >= 200 else kept[0]
            plain = predict(time, False)
            edited = predict(time, True) if number in STEPS else plain

            def split(m: Tensor, a: Tensor = a, x: Tensor = x) -> tuple[Tensor, Tensor]:
                if kind == "sample":
                    return m, (x - a.sqrt() * m) / (1 - a).sqrt()
                if kind == "v_prediction":
                    return a.sqrt() * x - (1 - a).sqrt() * m, a.sqrt() * m + (1 - a).sqrt() * x
                return (x - (1 - a).sqrt() * m) / a.sqrt(), m

            picture = split(edited)[0]
            if pipe.scheduler.config.clip_sample:
                picture = picture.clamp(-0.8, 0.8)
            noise = split(edited if both else plain)[1]
            s = 1.0 if time <= boost else eta
            s = s * ((1 - after) / (1 - a) * (1 - a / after)).sqrt()
            x = after.sqrt() * picture + (1 - after - s**2).sqrt() * noise
            if s > 0:
                fresh = [torch.randn(1, 4, 8, 8, generator=each) for each in generators]
                x = x + s * torch.cat(fresh)
            x = x.float()
    return x


def _close(ours: Tensor, truth: Tensor, effect: Tensor) -> None:
    assert float((truth - effect).abs().max()) > 1e-2
    assert float((ours - truth).abs().max()) < 1e-3 * float((truth - effect).abs().max())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_ddim_is_the_loop_by_hand(kind: str, scale: float) -> None:
    pipe = _pipe(prediction_type=kind)
    truth = _by_hand(pipe, scale)
    ours = _asymmetric(pipe, _steer(), scale=scale)
    _close(ours, truth, _call(pipe, scale))
    _close(ours, truth, _by_hand(pipe, scale, both=True))  # nor is it the usual edit


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_an_edit_of_one_branch_goes_through_guidance(branch: str) -> None:
    pipe = _pipe()
    truth = _by_hand(pipe, branch=branch)
    _close(_asymmetric(pipe, _steer(branch=branch)), truth, _by_hand(pipe))


def test_noise_and_clipping_and_boost() -> None:
    pipe = _pipe(clip_sample=True, clip_sample_range=0.8)
    truth = _by_hand(pipe, eta=0.7)
    _close(_asymmetric(pipe, _steer(), eta=0.7), truth, _by_hand(pipe))
    pipe = _pipe()
    truth = _by_hand(pipe, boost=401)
    assert 401 in pipe.scheduler.timesteps
    _close(_asymmetric(pipe, _steer(), boost=401), truth, _by_hand(pipe))
    with pytest.raises(InvalidInput, match="boost draws noise .* EulerDiscreteScheduler cannot"):
        _asymmetric(_pipe("EulerDiscreteScheduler"), _steer(), boost=401)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_euler_is_the_same_rule_as_ddim(kind: str) -> None:
    """Both integrate the same curve: from equal latents one step agrees up to the noise tables."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    shared = {**beta, "prediction_type": kind, "timestep_spacing": "leading", "steps_offset": 1}
    rng = torch.Generator().manual_seed(0)
    x, plain, edited = (torch.randn(2, 4, 8, 8, generator=rng) for _ in range(3))
    found = []
    for solver in (
        DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=False),
        EulerDiscreteScheduler(**shared),
    ):
        pipe = tiny.pipeline("sd")
        pipe.scheduler = solver
        solver.set_timesteps(10)
        time, later = solver.timesteps[3], solver.timesteps[4]
        kept = solver.alphas_cumprod
        if isinstance(solver, EulerDiscreteScheduler):
            solver.set_begin_index(3)
            solver.is_scale_input_called = True
        scale = kept[int(time)].sqrt() if isinstance(solver, EulerDiscreteScheduler) else 1
        back = kept[int(later)].sqrt() if isinstance(solver, EulerDiscreteScheduler) else 1
        with asymmetric(dr.Reader(pipe)):
            out = solver.step(Twin.of(edited, plain), time, x / scale)
        found.append((out.prev_sample * back, out.pred_original_sample))
    for ddim, euler in zip(*found, strict=True):
        assert float((ddim - euler).abs().max()) < 1e-4 * float(ddim.abs().max())


def test_flow_matching_is_the_loop_by_hand() -> None:
    pipe = tiny.pipeline("sd3")
    given = {**tiny.arguments("sd3", 4), "output_type": "latent"}
    site, rng = "transformer.transformer_blocks.0", torch.Generator().manual_seed(1)
    module = pipe.transformer.transformer_blocks[0]
    width = pipe.transformer.inner_dim
    vector = torch.randn(width, generator=rng)
    edit = dr.Steer(f"{site}.attn.to_out.0", vector, 3.0)

    def call(**more: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        return pipe(PROMPTS, generator=generators, **given, **more).images

    pairs: list[Tensor] = []
    calls: list[Tensor] = []

    def after_step(pipe: Any, step: int, time: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rule by hand, from the two predictions that plain and edited runs give here."""
        x, sigma, later = calls[-1], pipe.scheduler.sigmas[step], pipe.scheduler.sigmas[step + 1]
        plain, edited = pairs[-2:]
        x0, noise = x - sigma * edited, x + (1 - sigma) * plain
        calls.append(((1 - later) * x0 + later * noise).float())
        return {"latents": calls[-1]}

    def twice(m: Any, args: Any, kwargs: Any, output: Any) -> None:
        text = kwargs["encoder_hidden_states"]
        for push in (0.0 * vector, 3.0 * vector):
            hook = module.attn.to_out[0].register_forward_hook(lambda m, i, o, p=push: o + p)
            batch = torch.cat([calls[-1]] * 2)
            own = {**kwargs, "hidden_states": batch, "encoder_hidden_states": text}
            away, towards = pipe.transformer.forward(**own)[0].chunk(2)
            hook.remove()
            pairs.append(away + given["guidance_scale"] * (towards - away))

    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    height, width = given["height"] // 2, given["width"] // 2
    channels = pipe.transformer.config.in_channels
    start = [torch.randn(1, channels, height, width, generator=each) for each in generators]
    calls.append(torch.cat(start))
    handle = pipe.transformer.register_forward_hook(twice, with_kwargs=True)
    truth = call(callback_on_step_end=after_step)
    handle.remove()

    with asymmetric(dr.Reader(pipe), edit):
        ours = call()
    with dr.Reader(pipe).editing(edit):
        usual = call()
    _close(ours, truth, call())
    _close(ours, truth, usual)


@pytest.mark.parametrize("solver", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_strength_zero_is_bit_equal_to_no_edit(solver: str, scale: float) -> None:
    pipe = _pipe(solver)
    plain = _call(pipe, scale)
    assert torch.equal(_asymmetric(pipe, _steer(0.0, steps=None), scale=scale), plain)
    swept = _asymmetric(pipe, _steer(), scale=scale)
    assert torch.equal(swept[0], plain[0]) and not torch.equal(swept[1], plain[1])


def test_a_run_inside_the_block_follows_the_rule_and_other_steps_cost_nothing() -> None:
    pipe = _pipe()
    reader = dr.Reader(pipe)
    counted: list[int] = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: counted.append(1))
    settings = dict(num_inference_steps=5, guidance_scale=5.0, height=16, width=16)
    with asymmetric(reader):
        result = reader.run(
            PROMPTS, edits=_steer(), record=SITE, seeds=[3, 4], output_type="latent", **settings
        )
    handle.remove()
    assert len(counted) == 5 + len(STEPS)
    _close(result.images, _by_hand(pipe), _call(pipe))
    assert result.firing[0].calls == len(STEPS) and result.cache[SITE].shape[1:3] == (2, 5)
    usual = reader.run(PROMPTS, edits=_steer(), seeds=[3, 4], output_type="latent", **settings)
    _close(usual.images, _by_hand(pipe, both=True), _by_hand(pipe))


def test_lists_that_the_denoiser_uses_up_are_there_for_both_evaluations() -> None:
    from diffusers import StableDiffusionAdapterPipeline, T2IAdapter

    wanted = "vae text_encoder tokenizer unet scheduler safety_checker feature_extractor".split()
    parts = {name: _pipe().components[name] for name in wanted}
    adapter = T2IAdapter(3, [16, 32], num_res_blocks=1, downscale_factor=2)
    pipe = StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = _call(pipe, image=[picture, picture])
    swept = _asymmetric(pipe, _steer(), image=[picture, picture])
    assert torch.equal(swept[0], plain[0]) and not torch.equal(swept[1], plain[1])


def test_guidance_that_is_not_linear_is_done_to_both() -> None:
    """Rescaling divides by the spread of each prediction."""
    pipe = _pipe()
    truth = _by_hand(pipe, rescale=0.7)
    _close(_asymmetric(pipe, _steer(), guidance_rescale=0.7), truth, _by_hand(pipe))
    swapped = _call(pipe, guidance_rescale=0.7) + _by_hand(pipe) - _call(pipe)  # if it were linear
    assert float((swapped - truth).abs().max()) > 1e-2


def test_everything_is_restored_after_an_exception() -> None:
    pipe = _pipe()
    before = _call(pipe)
    own = dict(vars(pipe.scheduler))

    def fail(*_: Any) -> None:
        raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        _asymmetric(pipe, dr.Edit(SITE, fail))
    hook = pipe.unet.conv_out.register_forward_hook(fail)
    edited: list[int] = []
    pipe.unet.mid_block.register_forward_hook(lambda *_: edited.append(1))
    with pytest.raises(RuntimeError, match="of the caller"):
        _asymmetric(pipe, _steer(steps=None))
    hook.remove()
    assert edited and "step" not in vars(pipe.scheduler) and set(vars(pipe.scheduler)) >= set(own)
    assert not pipe.unet._forward_pre_hooks and not pipe.unet._forward_hooks
    assert torch.equal(_call(pipe), before)
    reader = dr.Reader(pipe)
    with (
        pytest.raises(NeverFired, match="no part of the subject was run"),
        asymmetric(reader, _steer()),
    ):
        pass
    assert not reader._subject.paused


def test_a_step_that_someone_else_replaced_is_put_back() -> None:
    pipe = _pipe()
    original = pipe.scheduler.step
    mine = lambda *args, **kwargs: original(*args, **kwargs)  # noqa: E731
    mine.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    pipe.scheduler.step = mine
    with asymmetric(dr.Reader(pipe)):
        assert pipe.scheduler.step is not mine
    assert pipe.scheduler.step is mine


def test_a_scheduler_set_inside_the_block_is_followed() -> None:
    pipe, other = _pipe(), _pipe("EulerDiscreteScheduler")
    with asymmetric(dr.Reader(pipe), _steer()):
        pipe.scheduler = other.scheduler
        ours = _call(pipe)
    assert "step" not in vars(other.scheduler)
    assert torch.equal(ours, _asymmetric(other, _steer()))


def test_what_has_no_split_is_refused() -> None:
    pipe = _pipe("DPMSolverMultistepScheduler")
    supported = "DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler"
    with pytest.raises(InvalidInput, match=f"DPMSolverMultistepScheduler .*: {supported}"):
        _asymmetric(pipe, _steer())
    with pytest.raises(InvalidInput, match="needs a diffusers pipeline .* got Linear"):
        with asymmetric(dr.Reader(torch.nn.Linear(2, 2))):
            pass
    pipe = _pipe()
    with asymmetric(dr.Reader(pipe)):
        with pytest.raises(InvalidInput, match="is on for this pipeline already"):
            with asymmetric(dr.Reader(pipe)):
                pass
    pipe = _pipe("EulerDiscreteScheduler")
    pipe.scheduler.set_timesteps(4)
    twin = Twin.of(torch.ones(1, 2), torch.zeros(1, 2))
    with asymmetric(dr.Reader(pipe)):
        with pytest.raises(InvalidInput, match="s_churn=0.5"):
            x = torch.ones(1, 2)
            pipe.scheduler.is_scale_input_called = True
            pipe.scheduler.step(twin, pipe.scheduler.timesteps[0], x, s_churn=0.5)
        with pytest.raises(InvalidInput, match="steps with something else"):
            pipe.unet(twin, 1, torch.ones(1, 1, 16))


def test_step_caches_are_refused() -> None:
    pipe = _pipe()
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_first_block_cache

    transformer = tiny.pipeline("flux")
    apply_first_block_cache(transformer.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(InvalidInput, match="evaluates the denoiser twice .* fbc_"):
        with asymmetric(dr.Reader(transformer)):
            pass
    assert "step" not in vars(transformer.scheduler) and pipe is not transformer


def test_twins_do_everything_to_both() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    twin = Twin.of(a.clone(), b.clone())
    joined = torch.cat([2 * twin, torch.ones(1)])
    assert torch.equal(joined.edited, torch.tensor([2.0, 4.0, 1.0]))
    assert torch.equal(joined.plain, torch.tensor([6.0, 10.0, 1.0]))
    first, second = twin.chunk(2)
    assert (first.plain.item(), second.edited.item()) == (3.0, 2.0)
    assert twin.shape == (2,) and twin.dtype == torch.float32 and "plain=" in repr(twin)
    values, _ = twin.max(0, keepdim=True)
    assert (values.edited.item(), values.plain.item()) == (2.0, 5.0)
    twin += 1
    assert torch.equal(twin.edited, a + 1) and torch.equal(twin.plain, b + 1)
    with pytest.raises(InvalidInput, match="writes a prediction into a tensor .* .add_."):
        a += twin
    with pytest.raises(InvalidInput, match="in place .__setitem__."):
        a[0] = twin[0]
    with pytest.raises(InvalidInput, match="in place .copy_."):
        a.copy_(twin)
    with pytest.raises(InvalidInput, match="in place .add."):
        torch.add(twin, 1, out=a)
    with pytest.raises(InvalidInput, match="reads a value of the prediction .__bool__."):
        bool((twin > 2.5).all())
    assert bool((twin > 1.5).all()) and torch.equal(a, torch.tensor([1.0, 2.0]))


def _color_of(reader: Any, sites: list[str], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Blue minus red at each site: [features], the mean over six scenes, all steps and tokens."""
    scenes = "circle top left, square middle right, star bottom center, cross middle center, "
    scenes += "triangle top right, circle bottom left"
    means = []
    for color in ("red", "blue"):
        prompts = [
            "a large {} {} at the {} {} on a white background".format(color, *each.split())
            for each in scenes.split(", ")
        ]
        record = [dr.Record(site, branch="cond") for site in sites]
        cache = reader.run(prompts, record=record, seeds=range(100, 106), **settings).cache
        means.append({site: cache[site].tensor.mean((0, 1, 2)) for site in sites})
    return {site: means[1][site] - means[0][site] for site in sites}


@pytest.mark.slow
def test_on_shapes_unet_the_rule_doubles_the_effect_of_a_direction() -> None:
    """At the output of up_blocks.2 twice the colour direction turns every object blue and leaves
    its place, where the usual edit stops half way. The mid-block of this model, 2 x 2 tokens, is
    not where it keeps colour: thirty times its direction turns nothing, under either rule.
    """
    from dreamreader.metrics import Outputs, build

    reader = dr.load("shapes-unet")
    settings = dr.zoo.settings(num_inference_steps=12, output_type="pt")
    prompts = [
        f"a large red {each} on a white background"
        for each in ("square at the middle left", "circle at the top center",
                     "star at the bottom right", "square at the middle center")
    ]  # fmt: skip
    rows = [{"target": "blue"}] * 4
    late, middle = "unet.up_blocks.2", "unet.mid_block"
    direction = _color_of(reader, [late, middle], settings)
    plain = Outputs(rows, images=reader.run(prompts, seeds=range(4), **settings).images)

    def measure(site: str, alpha: float) -> dict[str, list[Any]]:
        edit = dr.Steer(site, direction[site], alpha, branch="cond")
        images = reader.run(prompts, edits=edit, seeds=range(4), **settings).images
        got = Outputs(rows, images=images)
        found: dict[str, list[Any]] = {}
        for name in ("detector", "pixel_distance"):
            found |= build(name).measure(got, plain)
        return found

    usual, flat = measure(late, 2.0), measure(middle, 30.0)
    with asymmetric(reader):
        ours, ours_flat = measure(late, 2.0), measure(middle, 30.0)
    assert sum(ours["turned"]) >= 3 and sum(ours["place_kept"]) >= 3
    assert sum(usual["turned"]) <= 2
    assert sum(ours["pixel_distance"]) > 1.5 * sum(usual["pixel_distance"])
    assert not any(flat["turned"]) and not any(ours_flat["turned"])
