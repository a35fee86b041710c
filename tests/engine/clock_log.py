"""Asks a clock at every denoiser call, and keeps what it said."""

from typing import Any

import torch

from dreamreader.engine._clock import Clock, DenoiserCall
from dreamreader.errors import ClockUnknown

from .. import tiny

Said = DenoiserCall | ClockUnknown


class Log:
    """Attaches itself to the denoisers of a clock; `said` has one entry per call."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.said: list[Said] = []
        self.handles = [
            module.register_forward_hook(self._ask) for module in clock.denoisers.values()
        ]

    def _ask(self, *_: Any) -> None:
        try:
            self.said.append(self.clock.now())
        except ClockUnknown as error:
            self.said.append(error)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def moments(self) -> list[DenoiserCall]:
        """What was said, which may not contain an error."""
        for said in self.said:
            if isinstance(said, ClockUnknown):
                raise said
        return [said for said in self.said if isinstance(said, DenoiserCall)]


def call(name: str, pipe: Any, prompt: Any = "a red cat", **kwargs: Any) -> Any:
    """Run a tiny pipeline with a fixed seed, to latents."""
    arguments = {**tiny.arguments(name), "output_type": "latent", **kwargs}
    if "img2img" in name:
        arguments.setdefault("image", torch.full((1, 3, 16, 24), 0.5))
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, generator=generator, **arguments).images


def logged(name: str, pipe: Any, prompt: Any = "a red cat", **kwargs: Any) -> list[Said]:
    """What the clock says in one run of a tiny pipeline."""
    with Clock(pipe) as clock, Log(clock) as log:
        call(name, pipe, prompt, **kwargs)
    return log.said
