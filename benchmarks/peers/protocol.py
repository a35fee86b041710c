"""The job that every peer does, and how its process reports: JSON on standard input, a line out.

Imported by each peer in that peer's own environment: needs torch, diffusers and safetensors only.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """Pictures of `prompts` on `model`; `sites` of its UNet in the order in which they run.

    Record: what every site puts out at every step, uncond rows before cond rows, one tensor
    [steps, 2 * prompts, tokens, features] per site. Steer: adds `alpha` times the site's direction
    to the cond rows at every step.
    """

    model: str
    prompts: list[str]
    sites: list[str]
    steps: int
    guidance: float
    alpha: float
    rounds: int
    threads: int
    folder: str

    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline call, with fresh generators."""
        seeds = range(len(self.prompts))
        return {
            "prompt": self.prompts,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "np",
        }

    def direction(self, site: str, width: int) -> Tensor:
        """A unit vector [width] that depends on the site's place in the list only."""
        generator = torch.Generator().manual_seed(self.sites.index(site))
        vector = torch.randn(width, generator=generator)
        return vector / vector.norm()

    def widths(self, unet: torch.nn.Module) -> dict[str, int]:
        """Features that each site puts out."""
        return {site: unet.get_submodule(site).to_out[0].out_features for site in self.sites}  # type: ignore


class Peer(Protocol):
    """One library doing the job. Pictures are numpy arrays [prompts, height, width, 3]."""

    packages: tuple[str, ...]

    def __init__(self, job: Job): ...
    def plain(self) -> Any: ...
    def record(self) -> tuple[Any, dict[str, Tensor]]: ...
    def steer(self) -> Any: ...


def load_pipeline(folder: str) -> Any:
    """The pipeline in float32 on the CPU, without progress bar."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def serve(peer_class: type[Peer]) -> None:
    """Does the job of standard input: saves the results for the comparison, prints the times."""
    job = Job(**json.load(sys.stdin))
    torch.set_num_threads(job.threads)
    peer = peer_class(job)
    pictures, recorded = peer.record()
    results = {f"recorded/{site}": value for site, value in recorded.items()}
    results["pictures/plain"] = torch.from_numpy(peer.plain())
    results["pictures/record"] = torch.from_numpy(pictures)
    results["pictures/steer"] = torch.from_numpy(peer.steer())
    file = Path(job.folder) / f"{os.getpid()}.safetensors"
    save_file({name: value.contiguous() for name, value in results.items()}, file)
    del results, recorded
    times = interleaved(
        {"plain": peer.plain, "record": peer.record, "steer": peer.steer}, job.rounds
    )
    report = {
        "results": str(file),
        "versions": {
            name: metadata.version(name) for name in ("torch", "diffusers", *peer.packages)
        },
        "seconds": {name: statistics.median(each) for name, each in times.items()},
        "ratio": {name: ratio(times[name], times["plain"]) for name in ("record", "steer")},
    }
    print(json.dumps(report), flush=True)


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call per round; every second round runs in the opposite order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls) if index % 2 == 0 else list(calls)[::-1]:
            begun = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - begun)
    return times


def ratio(times: list[float], base: list[float]) -> dict[str, float]:
    """Median and 20/80 % quantiles of the ratios within each round."""
    ratios = sorted(a / b for a, b in zip(times, base, strict=True))
    cuts = statistics.quantiles(ratios, n=5, method="inclusive") if len(ratios) > 1 else ratios * 4
    return {"median": statistics.median(ratios), "q20": cuts[0], "q80": cuts[3]}
