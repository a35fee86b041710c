"""Time and branch of what is not one denoiser with a text encoder, against plain hooks.

By hand: the step is the number of `scheduler.step` calls that are over, and a chunk is conditional
where it changes with the prompt's embeddings and not with the negative ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dreamreader.engine._clock import Clock, DenoiserCall
from dreamreader.engine._subject import Subject
from dreamreader.engine._tracker import PipelineTracker
from dreamreader.errors import ClockUnknown

from .. import tiny
from ..tiny.parts import assemble
from ..tiny.weights import settle

Run = Callable[[str, str], Any]
"""(prompt, negative prompt) -> runs the pipeline"""


@dataclass
class Heard:
    """One call of a module: what was done before it, what it was given, what the clock says."""

    done: int
    given: dict[str, Tensor]
    said: DenoiserCall | ClockUnknown
    rows: int = field(init=False)

    def __post_init__(self):
        self.rows = len(next(iter(self.given.values())))


def heard(pipe: Any, name: str, run: Callable[[], Any]) -> list[Heard]:
    """Every call of a component in one run."""
    found: list[Heard] = []
    done = [0]
    scheduler = pipe.scheduler
    step = scheduler.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        done[0] += 1
        return step(*args, **kwargs)

    def listen(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given: dict[str, Tensor] = {}
        for key, value in [*enumerate(args), *kwargs.items()]:
            _flatten(str(key), value, given)
        try:
            said: DenoiserCall | ClockUnknown = clock.now()
        except ClockUnknown as error:
            said = error
        found.append(Heard(done[0], given, said))

    scheduler.step = counted
    with Clock(pipe) as clock:
        hook = getattr(pipe, name).register_forward_pre_hook(listen, with_kwargs=True)
        try:
            run()
        finally:
            hook.remove()
            del scheduler.step
    return found


def _flatten(key: str, value: Any, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor) and value.dim():
        found[key] = value.detach().clone()
    elif isinstance(value, list) and key in ("0", "2"):  # one tensor for each batch entry
        found[key] = torch.stack([each.detach().float().flatten() for each in value])
    elif isinstance(value, dict):
        for name, inner in value.items():
            _flatten(f"{key}.{name}", inner, found)


def entries_changed(one: Heard, two: Heard, latents: set[str]) -> set[int]:
    """Batch entries whose inputs differ, apart from the latents."""
    found = set()
    for key, value in one.given.items():
        if key not in latents and len(value) == one.rows:
            found |= {n for n in range(one.rows) if not torch.equal(value[n], two.given[key][n])}
    return found


def check(pipe: Any, name: str, run: Run, latents: set[str], extra: tuple[str, ...] = ()) -> list:
    """Compare step and branches of every call with what is found by hand."""
    base = heard(pipe, name, lambda: run("a", "b"))
    other = heard(pipe, name, lambda: run("c", "b"))
    negative = heard(pipe, name, lambda: run("a", "d"))
    assert base and len(base) == len(other) == len(negative)
    for one, two, three in zip(base, other, negative, strict=True):
        assert isinstance(one.said, DenoiserCall), one.said
        assert one.said.step == one.done and one.said.evaluation == 0
        names, size = one.said.branches, one.rows // len(one.said.branches)
        chunks = {n: set(range(size * at, size * (at + 1))) for at, n in enumerate(names)}
        told = entries_changed(one, two, latents)
        assert told == set().union(*(chunks[n] for n in names if n in ("cond", *extra)))
        if "uncond" in names:
            assert chunks["uncond"] <= entries_changed(one, three, latents)
    return [each.said.branches for each in base]


def embeds(seed: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(ord(seed)))


BOTH = ("uncond", "cond")


def cascade_prior():
    from diffusers.models import StableCascadeUNet

    from ..tiny import text

    prior = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        patch_size=1,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(1, 1),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        )
        * 2,
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        clip_image_in_channels=8,
        clip_seq=4,
        dropout=(0.1, 0.1),
        switch_level=(False,),
        self_attn=True,
        timestep_conditioning_type=("sca", "crp"),
    )
    tokenizer = text.clip_tokenizer()
    pipe = diffusers.StableCascadePriorPipeline(
        tokenizer=tokenizer,
        text_encoder=text.clip_encoder(tokenizer, "cascade-text", projected=True),
        prior=settle(prior, "cascade-prior"),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        resolution_multiple=8.0,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_stable_cascade_prior_has_cond_first_and_a_time() -> None:
    pipe = cascade_prior()
    pipe.encode_image = lambda *args, **kwargs: None

    def run(prompt: str, negative: str, guidance: float = 4.0) -> Any:
        given = {
            f"{name}{kind}": embeds(text, 2, 5 if kind == "" else 1, 16)
            for name, text in (("prompt_embeds", prompt), ("negative_prompt_embeds", negative))
            for kind in ("", "_pooled")
            if guidance > 1 or name == "prompt_embeds"
        }
        return pipe(
            height=32,
            width=48,
            num_inference_steps=3,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(0),
            **given,
        )

    said = check(pipe, "prior", run, {"sample", "timestep_ratio"})
    assert said == [("cond", "uncond")] * 3
    calls = heard(pipe, "prior", lambda: run("a", "b", 1.0))
    assert [each.said.branches for each in calls] == [("cond",)] * 3
    # by hand: three equal steps from 1, the last of which ends at 0
    assert [each.said.timestep for each in calls] == pytest.approx([1, 2 / 3, 1 / 3])
    assert [each.said.fraction for each in calls] == pytest.approx([0, 1 / 3, 2 / 3])


def kandinsky_unet(conditions: int = 16):
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=16,
        attention_head_dim=8,
        encoder_hid_dim=conditions,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=4,
    )
    return settle(unet, "kandinsky-unet")


def test_kandinsky_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    movq = settle(
        diffusers.VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        ),
        "kandinsky-movq",
    )
    pipe = diffusers.KandinskyV22Pipeline(
        unet=kandinsky_unet(), scheduler=diffusers.DDPMScheduler(), movq=movq
    )
    pipe.set_progress_bar_config(disable=True)

    def run(prompt: str, negative: str) -> Any:
        return pipe(
            image_embeds=embeds(prompt, 2, 16),
            negative_image_embeds=embeds(negative, 2, 16),
            num_images_per_prompt=2,
            height=32,
            width=32,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )

    assert check(pipe, "unet", run, {"sample"}) == [BOTH] * 3
    with monkeypatch.context() as patch:  # what a decoder of another order would do
        cat = torch.cat

        def swapped(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
            return cat(tensors[::-1] if tensors[0].dim() == 2 else tensors, *args, **kwargs)

        patch.setattr(torch, "cat", swapped)
        calls = heard(pipe, "unet", lambda: run("a", "b"))
    assert "should be uncond holds the prompt embeddings of cond" in str(calls[0].said)
    with PipelineTracker(Subject(pipe)) as tracker:
        run("a", "b")
        assert tracker.rows == 4 and tracker.prompts is None


def kandinsky_prior():
    from ..tiny import text

    prior = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        embedding_dim=16,
        num_embeddings=77,
        additional_embeddings=4,
        encoder_hid_proj_type="linear",
    )
    tokenizer = text.clip_tokenizer()
    pipe = diffusers.KandinskyV22PriorPipeline(
        prior=settle(prior, "kandinsky-prior"),
        image_encoder=None,
        text_encoder=text.clip_encoder(tokenizer, "kandinsky-text", projected=True),
        tokenizer=tokenizer,
        scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            num_train_timesteps=1000,
            clip_sample_range=5.0,
        ),
        image_processor=None,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.get_zero_embed = lambda *args, **kwargs: torch.zeros(1, 16)
    return pipe


def test_kandinsky_prior_has_a_time() -> None:
    pipe = kandinsky_prior()
    texts = {"a": "a red cat", "b": "", "c": "a large blue circle", "d": ""}

    def run(prompt: str, negative: str) -> Any:
        return pipe(
            [texts[prompt]] * 2,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )

    base = heard(pipe, "prior", lambda: run("a", "b"))
    other = heard(pipe, "prior", lambda: run("c", "b"))
    for one, two in zip(base, other, strict=True):
        assert one.said.step == one.done and one.said.branches == BOTH
        assert entries_changed(one, two, {"0"}) == {2, 3}
    assert len(base) == 3 and [e.said.timestep for e in base] == pipe.scheduler.timesteps.tolist()


def test_kandinsky_prior_makes_rows_of_negative_prompts() -> None:
    pipe = kandinsky_prior()
    with PipelineTracker(Subject(pipe)) as tracker:
        said = []
        hook = pipe.prior.register_forward_pre_hook(lambda *_: said.append(tracker.now.branches))
        pipe("a red cat", negative_prompt="a dog", num_inference_steps=2, output_type="pt")
        hook.remove()
        assert tracker.rows == 2 and tracker.prompts == ["a red cat", "a dog"]
    assert said == [BOTH] * 2


@pytest.mark.parametrize("guess", [False, True])
def test_a_controlnet_has_the_step_and_branches_of_its_call(guess: bool) -> None:
    pipe = assemble("StableDiffusionControlNetPipeline", "sd-control")
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    texts = {"a": "a red cat", "b": "a dog", "c": "a blue cat", "d": "two houses"}

    def run(prompt: str, negative: str) -> Any:
        return pipe(
            [texts[prompt]] * 2,
            torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)),
            negative_prompt=[texts[negative]] * 2,
            guess_mode=guess,
            num_inference_steps=3,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )

    said = check(pipe, "controlnet", run, {"0", "controlnet_cond"})
    assert said == [("cond",) if guess else BOTH] * 3
    # what the ControlNet gives the UNet differs with the prompt, as its latents do
    passed = {"0", "mid_block_additional_residual", "down_block_additional_residuals"}
    assert check(pipe, "unet", run, passed) == [BOTH] * 3


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # 2026-11
def test_a_controlnet_of_separate_calls_runs_for_the_prompt() -> None:
    pipe = assemble("FluxControlNetPipeline", "flux-control")
    with Clock(pipe) as clock:
        said = []
        hook = pipe.controlnet.register_forward_pre_hook(lambda *_: said.append(clock.now()))
        pipe(
            "a red cat",
            negative_prompt="a dog",
            true_cfg_scale=4.0,
            control_image=torch.rand(1, 3, 16, 24),
            height=16,
            width=24,
            max_sequence_length=16,
            num_inference_steps=2,
            output_type="latent",
        )
        hook.remove()
    assert [(each.step, each.branches) for each in said] == [(0, ("cond",)), (1, ("cond",))]


def modular(guider: Any):
    """The denoising loop of the modular SDXL pipeline, with the prompts' embeddings given."""
    from diffusers.modular_pipelines.stable_diffusion_xl import modular_blocks_stable_diffusion_xl

    own = tiny.pipeline("sdxl")
    pipe = modular_blocks_stable_diffusion_xl.StableDiffusionXLAutoBlocks().init_pipeline()
    parts = {k: v for k, v in own.components.items() if k in pipe.component_names and v is not None}
    pipe.update_components(**parts, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modular_run(pipe: Any, prompt: str, negative: str) -> Any:
    pipe.guider._num_inference_steps = None  # diffusers 0.42 asks the last run's step at the start
    return pipe(
        prompt=prompt,
        negative_prompt=negative,
        height=16,
        width=24,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        output="latents",
    )


@pytest.mark.filterwarnings("ignore")  # 2026-11: modular pipelines call themselves experimental
@pytest.mark.parametrize("stop", [1.0, 0.5])
def test_passes_of_a_modular_pipeline_are_those_of_its_guider(stop: float) -> None:
    pipe = modular(diffusers.ClassifierFreeGuidance(guidance_scale=4.0, stop=stop))
    texts = {"a": "a red cat", "b": "a dog", "c": "a blue cat", "d": "two houses"}
    run = lambda prompt, negative: modular_run(pipe, texts[prompt], texts[negative])  # noqa: E731
    names = check(pipe, "unet", run, {"0"})
    guided = [("cond",), ("uncond",)]
    assert names == guided * 4 if stop == 1.0 else guided * 2 + [("cond",)] * 2
    assert not {"prepare_inputs", "prepare_inputs_from_block_state"} & set(vars(pipe.guider))


@pytest.mark.filterwarnings("ignore")
def test_rows_of_a_modular_pipeline() -> None:
    pipe = modular(diffusers.ClassifierFreeGuidance(guidance_scale=4.0))
    with PipelineTracker(Subject(pipe)) as tracker:
        modular_run(pipe, ["a red cat", "a blue cat"], ["", ""])
        assert tracker.rows == 2 and tracker.prompts == ["a red cat", "a blue cat"]


def z_image(**kwargs: Any):
    pipe = assemble("ZImagePipeline", "z-image")

    def run(prompt: str, negative: str) -> Any:
        return pipe(
            prompt_embeds=[embeds(prompt, 5, 32), embeds(prompt, 5, 32)],
            negative_prompt_embeds=[embeds(negative, 5, 32), embeds(negative, 5, 32)],
            height=16,
            width=24,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **{"guidance_scale": 4.0, **kwargs},
        )

    return pipe, run


def test_z_image_has_cond_first_and_leaves_guidance_out_where_it_says() -> None:
    pipe, run = z_image()
    assert check(pipe, "transformer", run, {"0"}) == [("cond", "uncond")] * 3
    pipe, run = z_image(guidance_scale=0.0)
    assert check(pipe, "transformer", run, {"0"}) == [("cond",)] * 3
    pipe, run = z_image(cfg_truncation=0.3)  # from 30 % of the way on
    names = check(pipe, "transformer", run, {"0"})
    assert names[0] == ("cond", "uncond") and names[-1] == ("cond",)


def test_sana_sprint_says_its_steps() -> None:
    pipe = assemble("SanaSprintPipeline", "sana-sprint")
    arguments = {
        "height": 32,
        "width": 64,
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        "clean_caption": False,
        "num_inference_steps": 2,
        "output_type": "latent",
    }
    calls = heard(pipe, "transformer", lambda: pipe("a red cat", **arguments))
    assert [each.said.step for each in calls] == [each.done for each in calls] == [0, 1]
    # by hand: the schedule is pi/2, 1.3, 0, and its last entry ends a step
    assert [each.said.timestep for each in calls] == pytest.approx([1.5708, 1.3])
    assert [each.said.fraction for each in calls] == [0.0, 0.5]
