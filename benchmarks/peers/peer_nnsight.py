"""The job through nnsight: one trace over the whole pipeline, iterated over the denoising steps."""

from typing import Any

import torch
from nnsight.modeling.diffusion import DiffusionModel
from protocol import Job, serve
from torch import Tensor


class Nnsight:
    packages = ("nnsight",)

    def __init__(self, job: Job):
        self.job = job
        self.model = DiffusionModel(job.model, dispatch=True)
        self.model.pipeline.to(torch.float32)  # the weights are stored in half precision
        self.model.pipeline.set_progress_bar_config(disable=True)
        self.modules = {site: self._envoy(site) for site in job.sites}
        widths = job.widths(self.model.pipeline.unet)
        self.pushes = {site: job.alpha * job.direction(site, widths[site]) for site in job.sites}

    def _envoy(self, site: str) -> Any:
        envoy = self.model.unet
        for part in site.split("."):
            envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
        return envoy

    def plain(self) -> Any:
        return self.model.pipeline(**self.job.arguments()).images

    def record(self) -> tuple[Any, dict[str, Tensor]]:
        modules, steps = self.modules, self.job.steps
        seen: dict[str, list[Tensor]] = {site: [] for site in modules}
        with self.model.generate(**self.job.arguments()) as tracer:
            for _ in tracer.iter[0:steps]:
                for site, module in modules.items():
                    seen[site].append(module.output)
            output = self.model.output.save()
        return output.images, {site: torch.stack(values) for site, values in seen.items()}

    def steer(self) -> Any:
        modules, pushes, steps = self.modules, self.pushes, self.job.steps
        cond = slice(len(self.job.prompts), None)
        with self.model.generate(**self.job.arguments()) as tracer:
            for _ in tracer.iter[0:steps]:
                for site, module in modules.items():
                    changed = module.output.clone()
                    changed[cond] += pushes[site]
                    module.output = changed
            output = self.model.output.save()
        return output.images


if __name__ == "__main__":
    serve(Nnsight)
