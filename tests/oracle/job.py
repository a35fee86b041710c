"""One run to be done by hand: a pipeline, its prompts and arguments."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .trace import Change


@dataclass
class Job:
    """Rows are prompts times `images` per prompt; each row draws from its own generator."""

    pipe: Any
    prompts: list[str]
    seeds: list[int]
    arguments: dict[str, Any] = field(default_factory=dict)
    change: Change | None = None
    images: int = 1

    def __post_init__(self) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.rows = len(self.prompts) * self.images
        assert len(self.seeds) == self.rows

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def steps(self) -> int:
        return self["num_inference_steps"]

    @property
    def guided(self) -> bool:
        return self["guidance_scale"] > 1

    def negative(self) -> list[str]:
        return [self.arguments.get("negative_prompt", "")] * len(self.prompts)

    def noise(self, *shape: int) -> Tensor:
        """[rows, *shape], each row from its own generator."""
        dtype = self.pipe.dtype
        rows = [torch.randn(1, *shape, generator=each, dtype=dtype) for each in self.generators]
        return torch.cat(rows)

    def latent_size(self, factor: int) -> tuple[int, int]:
        return self["height"] // factor, self["width"] // factor

    def set_times(self) -> None:
        """The scheduler's own timesteps for this many steps, or those that the call names."""
        given = {
            name: self.arguments[name] for name in ("timesteps", "sigmas") if name in self.arguments
        }
        self.pipe.scheduler.set_timesteps(**(given or {"num_inference_steps": self.steps}))


def shift(scheduler: Any, tokens: int, base: float = 0.5, top: float = 1.15) -> float:
    """How far the schedule moves towards noise: a line through (256, base) and (4096, top)."""
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", base), config.get("max_shift", top)
    slope = (top - base) / (high - low)
    return tokens * slope + (base - slope * low)


def pack(latents: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H/2 * W/2, 4 C]: each 2 x 2 patch is one token, channel by channel."""
    rows, channels, height, width = latents.shape
    patches = latents.view(rows, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(
        rows, (height // 2) * (width // 2), 4 * channels
    )
