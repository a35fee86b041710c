"""The job through dreamreader."""

from typing import Any

from protocol import Job, load_pipeline, serve
from torch import Tensor

import dreamreader as dr


class Dreamreader:
    packages = ("dreamreader",)

    def __init__(self, job: Job):
        self.job = job
        self.pipe = load_pipeline(job.model)
        self.reader = dr.Reader(self.pipe)
        widths = job.widths(self.pipe.unet)
        self.edits = [
            dr.Steer(
                f"unet.{site}", job.direction(site, widths[site]), alpha=job.alpha, branch="cond"
            )
            for site in job.sites
        ]

    def plain(self) -> Any:
        return self.pipe(**self.job.arguments()).images

    def record(self) -> tuple[Any, dict[str, Tensor]]:
        with self.reader.recording([f"unet.{site}" for site in self.job.sites]) as cache:
            pictures = self.plain()
        return pictures, {site: self._ordered(cache[f"unet.{site}"]) for site in self.job.sites}

    def _ordered(self, activation: Any) -> Tensor:
        """[steps, branches * rows, tokens, features], as the other peers have it."""
        return activation.tensor.permute(2, 1, 0, 3, 4).flatten(1, 2)

    def steer(self) -> Any:
        with self.reader.editing(self.edits):
            return self.plain()


if __name__ == "__main__":
    serve(Dreamreader)
