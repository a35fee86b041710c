"""The job through plain forward hooks: what a careful person writes for this one pipeline."""

from typing import Any

import torch
from protocol import Job, load_pipeline, serve
from torch import Tensor


class Hooks:
    packages = ()

    def __init__(self, job: Job):
        self.job = job
        self.pipe = load_pipeline(job.model)
        self.modules = {site: self.pipe.unet.get_submodule(site) for site in job.sites}
        widths = job.widths(self.pipe.unet)
        self.pushes = {site: job.alpha * job.direction(site, widths[site]) for site in job.sites}

    def plain(self) -> Any:
        return self.pipe(**self.job.arguments()).images

    def record(self) -> tuple[Any, dict[str, Tensor]]:
        seen: dict[str, list[Tensor]] = {site: [] for site in self.job.sites}

        def keep(values: list[Tensor]):
            return lambda module, inputs, output: values.append(output)

        handles = [
            module.register_forward_hook(keep(seen[site])) for site, module in self.modules.items()
        ]
        try:
            pictures = self.plain()
        finally:
            for handle in handles:
                handle.remove()
        return pictures, {site: torch.stack(values) for site, values in seen.items()}

    def steer(self) -> Any:
        def add(push: Tensor):
            def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
                cond = slice(output.shape[0] // 2, None)
                output = output.clone()
                output[cond] += push
                return output

            return hook

        handles = [
            module.register_forward_hook(add(self.pushes[site]))
            for site, module in self.modules.items()
        ]
        try:
            return self.plain()
        finally:
            for handle in handles:
                handle.remove()


if __name__ == "__main__":
    serve(Hooks)
