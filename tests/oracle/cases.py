"""The runs that are done by hand, by the pipeline and by the engine."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import tiny
from . import Job, Trace, run
from .trace import Change

PROMPTS = ["a red cat", "two small houses by the tree"]


# an attention output of each denoiser: component, path
ATTENTION: dict[str, tuple[str, str]] = {
    "sd": ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2"),
    "sdxl": ("unet", "up_blocks.0.attentions.1.transformer_blocks.1.attn2"),
    "sd3": ("transformer", "transformer_blocks.0.attn.to_out.0"),
    "flux": ("transformer", "transformer_blocks.0.attn.to_out.0"),
    "qwen-image": ("transformer", "transformer_blocks.0.attn.to_out.0"),
    "aura-flow": ("transformer", "joint_transformer_blocks.0.attn.to_out.0"),
    "pixart-sigma": ("transformer", "transformer_blocks.0.attn2"),
    "sana": ("transformer", "transformer_blocks.0.attn2"),
    "cogview4": ("transformer", "transformer_blocks.0.attn1.to_out.0"),
    "lumina2": ("transformer", "layers.0.attn"),
}

_BUILT: dict[tuple[str, torch.dtype], Any] = {}
_TRUTHS: dict[str, Trace] = {}


@dataclass(frozen=True)
class Case:
    """A tiny pipeline, its scheduler (None: its own), call arguments beside the usual ones."""

    name: str
    pipeline: str
    scheduler: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    images: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def pipe(self) -> Any:
        """A pipeline and scheduler of its own; the models below are built once a session."""
        key = (self.pipeline, self.dtype)
        if key not in _BUILT:
            _BUILT[key] = tiny.pipeline(self.pipeline).to(self.dtype)
        pipe = copy.copy(_BUILT[key])
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        if self.scheduler is not None:
            import diffusers

            solver = getattr(diffusers, self.scheduler)
            pipe.scheduler = solver.from_config(pipe.scheduler.config, **self.config)
        return pipe

    @property
    def attention(self) -> tuple[str, str]:
        """(component, path below it) of an attention output."""
        return ATTENTION[self.pipeline.removesuffix("-img2img").removesuffix("-true-cfg")]

    @property
    def seeds(self) -> list[int]:
        return list(range(3, 3 + len(PROMPTS) * self.images))

    def call_arguments(self) -> dict[str, Any]:
        found = {**tiny.arguments(self.pipeline, self.steps), **self.arguments}
        if "img2img" in self.pipeline:
            rng = torch.Generator().manual_seed(0)
            found["image"] = torch.rand(len(self.seeds), 3, 16, 24, generator=rng)
        return found

    def by_hand(self, pipe: Any, change: Change | None = None) -> Trace:
        job = Job(pipe, PROMPTS, self.seeds, self.call_arguments(), change, self.images)
        return run(self.pipeline, job)

    @property
    def truth(self) -> Trace:
        """The run by hand without a change; done once a session, not to be written to."""
        if self.name not in _TRUTHS:
            _TRUTHS[self.name] = self.by_hand(self.pipe())
        return _TRUTHS[self.name]

    def pipeline_arguments(self) -> dict[str, Any]:
        """What the pipeline itself is called with, for latents out."""
        found = self.call_arguments()
        until = found.pop("guidance_until", None)
        if until is not None:
            found["callback_on_step_end"] = _switch_off(until)
            found["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
        if isinstance(found.get("negative_prompt"), str):
            found["negative_prompt"] = [found["negative_prompt"]] * len(PROMPTS)
        if self.images > 1:
            found["num_images_per_prompt"] = self.images
        return {
            "prompt": list(PROMPTS),
            "generator": [torch.Generator().manual_seed(seed) for seed in self.seeds],
            "output_type": "latent",
            **found,
        }


def _switch_off(turns: int) -> Any:
    """A callback that ends guidance after `turns`, as the diffusers guide does it."""

    def callback(pipe: Any, turn: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if turn == turns - 1:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    return callback


_SOLVERS = (
    "DDIM DDPM EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete "
    "DPMSolverMultistep UniPCMultistep LCM PNDM"
).split()


def _solver(pipeline: str, solver: str, steps: int = 5) -> Case:
    config = {"skip_prk_steps": True} if solver == "PNDM" else {}
    return Case(f"{pipeline}-{solver}", pipeline, f"{solver}Scheduler", config, steps)


CASES: list[Case] = [
    *(Case(name, name) for name in tiny.PIPELINES),
    *(_solver("sd", solver) for solver in _SOLVERS),
    *(
        _solver("sd-img2img", solver)
        for solver in ("HeunDiscrete", "KDPM2Discrete", "PNDM", "EulerDiscrete")
    ),
    _solver("sdxl", "HeunDiscrete"),
    _solver("sdxl-img2img", "HeunDiscrete"),
    _solver("sd3", "FlowMatchHeunDiscrete", 4),
    Case("sana-flow", "sana", "FlowMatchEulerDiscreteScheduler"),
    # guidance off: a batch of two is two pictures, not two branches
    *(
        Case(f"{name}-unguided", name, arguments={"guidance_scale": 1.0})
        for name in (
            "sd",
            "sdxl",
            "sd3",
            "pixart-sigma",
            "sana",
            "cogview4",
            "lumina2",
            "aura-flow",
        )
    ),
    # guidance switched off on the way
    Case("sd-cutoff", "sd", steps=5, arguments={"guidance_until": 2}),
    Case("sd-heun-cutoff", "sd", "HeunDiscreteScheduler", arguments={"guidance_until": 4}),
    Case("lumina2-cutoff", "lumina2", arguments={"cfg_trunc_ratio": 0.5}),
    *(Case(f"{name}-images", name, images=2) for name in ("sd", "sdxl", "sd3", "flux-true-cfg")),
    # schedules in which timestep, sigma and place do not follow from each other in the usual way
    _solver("sd", "KDPM2AncestralDiscrete"),
    Case("sd-PNDM-runge-kutta", "sd", "PNDMScheduler", {"skip_prk_steps": False}, steps=5),
    Case("sd-karras", "sd", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, steps=6),
    Case("sd-heun-karras", "sd", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    Case("sd-trailing", "sd", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    Case("sd-own-times", "sd", "DDPMScheduler", arguments={"timesteps": [900, 400, 300, 20]}),
    Case("sdxl-first-part", "sdxl", steps=6, arguments={"denoising_end": 0.6}),
    Case("sana-UniPC", "sana", "UniPCMultistepScheduler"),
    # a third pass that leaves layers out, in some of the steps
    Case("sd3-skip-layers", "sd3", steps=8, arguments={"skip_guidance_layers": [1]}),
    # timesteps rounded to the model's type
    *(
        Case(f"{name}-bf16", name, dtype=torch.bfloat16)
        for name in ("sd", "flux", "qwen-image", "lumina2", "aura-flow")
    ),
]
