"""The independent truth for the engine: each pipeline's denoising loop, written by hand.

An oracle uses the pipeline's own parts (encode_prompt, denoiser, scheduler), but the loop, the
guidance, the names of the branches and the counting of steps are written here, from the
definition of the method. It ends in the pipeline's own latents, which proves the loop; its log
and its hand-made change are what the engine is compared with.
"""

from collections.abc import Callable

import torch

from . import dit, mmdit, unets
from .job import Job
from .trace import Call, Change, Trace

__all__ = ["Call", "Change", "Job", "Trace", "run"]

_LOOPS: dict[str, Callable[[Job], Trace]] = {
    "sd": unets.stable_diffusion,
    "sdxl": unets.stable_diffusion_xl,
    "sd-img2img": unets.stable_diffusion_img2img,
    "sdxl-img2img": unets.stable_diffusion_xl_img2img,
    "sd3": mmdit.stable_diffusion_3,
    "flux": mmdit.flux,
    "flux-true-cfg": mmdit.flux,
    "flux-img2img": mmdit.flux_img2img,
    "qwen-image": mmdit.qwen_image,
    "aura-flow": mmdit.aura_flow,
    "pixart-sigma": dit.pixart_sigma,
    "sana": dit.sana,
    "cogview4": dit.cogview4,
    "lumina2": dit.lumina2,
}


@torch.no_grad()
def run(name: str, job: Job) -> Trace:
    """Run `job` by hand through the loop of the tiny pipeline `name`."""
    return _LOOPS[name](job)
