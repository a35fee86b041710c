"""What recording and editing add to generation, and what a sweep gains from being one batch.

    python benchmarks/engine.py [--model shapes-unet] [--untrained] [--pictures 16] [--rounds 7]

Every figure is a ratio to the plain pipeline (or to one run for each strength) within the same
round. No time is printed or written unless a no-op edit is bit-equal to no edit, recorded values
are those that a plain hook sees, and a sweep's pictures are those of its strengths alone.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from paired import environment, interleaved, summary, write
from torch import Tensor
from untrained import save_untrained

import dreamreader as dr

ATTENTION = "unet.**.attn[12]"
STEERED = "unet.mid_block.attentions.0"
GOALS = {"noop": 1.02, "record": 1.05, "sweep_batch": 1.03}
CLOSE = 2e-3  # of pictures in [0, 1]: batches of another size round differently, over every step


class Job:
    """One model, its prompts and everything that is timed."""

    def __init__(self, model: str, pictures: int, steps: int, device: str):
        from dreamreader import zoo

        self.pipe = zoo.load_pipeline(model).to(device)
        self.reader = dr.Reader(self.pipe)
        colors, shapes = (
            ("red", "blue", "green", "yellow"),
            ("circle", "square", "star", "triangle"),
        )
        captions = [f"a {color} {shape}" for color in colors for shape in shapes]
        self.prompts = (captions * (pictures // len(captions) + 1))[:pictures]
        self.seeds = list(range(pictures))
        self.settings = {**zoo.settings(num_inference_steps=steps), "output_type": "np"}
        self.sites = self.reader.sites(ATTENTION).names
        self.directions = {site: self._direction(site) for site in self.sites}
        self.strengths = [20.0 * n for n in range(pictures)]

    def _direction(self, site: str, of: str = "to_out.0") -> Tensor:
        module: Any = self.pipe.unet.get_submodule(f"{site.removeprefix('unet.')}.{of}")
        generator = torch.Generator().manual_seed(0)
        return torch.randn(module.weight.shape[0], generator=generator)

    def plain(self) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return self.pipe(self.prompts, generator=generators, **self.settings).images

    def edited(self, alpha: float) -> Any:
        steer = dr.Steer(ATTENTION, self.directions, alpha=alpha)
        return self.reader.run(self.prompts, edits=steer, seeds=self.seeds, **self.settings).images

    def noop(self) -> Any:
        return self.edited(0.0)

    def steer(self) -> Any:
        return self.edited(0.05)

    def record(self) -> Any:
        return self.reader.run_with_cache(
            self.prompts, sites=ATTENTION, seeds=self.seeds, **self.settings
        )

    def batch(self) -> Any:
        """The rows of the sweep through the plain pipeline."""
        count = len(self.strengths)
        generators = [torch.Generator().manual_seed(0) for _ in range(count)]
        return self.pipe([self.prompts[0]] * count, generator=generators, **self.settings).images

    def sweep_at_once(self) -> Any:
        return self._swept(self.strengths)

    def sweep_one_by_one(self) -> Any:
        return [self._swept(alpha)[0] for alpha in self.strengths]

    def _swept(self, alpha: Any) -> Any:
        direction = self._direction(f"{STEERED}", "proj_out")
        steer = dr.Steer(STEERED, direction / direction.norm(), alpha=alpha, branch="cond")
        return self.reader.run(self.prompts[0], edits=steer, seeds=0, **self.settings).images


def problems(job: Job) -> list[str]:
    """In words, what is not as it must be."""
    found = []
    plain = torch.as_tensor(job.plain())
    if not torch.equal(plain, torch.as_tensor(job.noop())):
        found.append("a no-op edit changed the pictures")
    if torch.equal(plain, torch.as_tensor(job.steer())):
        found.append("steering changed no picture")
    pictures, cache = job.record()
    if not torch.equal(plain, torch.as_tensor(pictures)):
        found.append("recording changed the pictures")
    found += [
        f"{site}: recorded values are not those of a plain hook" for site in wrong(job, cache)
    ]
    at_once = torch.as_tensor(job.sweep_at_once())
    alone = torch.stack([torch.as_tensor(each) for each in job.sweep_one_by_one()])
    error, effect = (at_once - alone).abs().max(), (at_once - at_once[:1]).abs().max()
    if not error <= min(CLOSE, effect / 50):
        found.append(
            f"the sweep differs by {error:.1e} from its strengths alone (its effect: {effect:.1e})"
        )
    return found


def wrong(job: Job, cache: Any) -> list[str]:
    """Sites whose recording is not what a plain hook sees, bit for bit."""
    seen: dict[str, list[Tensor]] = {site: [] for site in job.sites}

    def keep(values: list[Tensor]):
        return lambda module, inputs, output: values.append(output.detach().to("cpu", copy=True))

    handles = [
        job.pipe.unet.get_submodule(site.removeprefix("unet.")).register_forward_hook(
            keep(seen[site])
        )
        for site in job.sites
    ]
    try:
        job.plain()
    finally:
        for handle in handles:
            handle.remove()
    bad = []
    for site, values in seen.items():
        got = cache[site].tensor  # [rows, branches, steps, tokens, features]
        want = torch.stack(values, 1).unflatten(0, (got.shape[1], -1)).transpose(0, 1)
        if cache[site].branches != ("uncond", "cond") or not torch.equal(got, want):
            bad.append(site)
    return bad


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = save_untrained(options.model, folder) if options.untrained else options.model
        job = Job(model, options.pictures, options.steps, options.device)
    found = problems(job)
    if found:
        print("no times, since these checks failed:", *found, sep="\n  ", file=sys.stderr)
        return 1
    calls = {name: getattr(job, name) for name in ("plain", "noop", "record", "steer")}
    times, left_out = interleaved(calls, options.rounds)
    sweeps = {name: getattr(job, name) for name in ("sweep_one_by_one", "batch", "sweep_at_once")}
    swept, left_out_too = interleaved(sweeps, max(3, options.rounds // 2))
    ratios = {name: summary(times[name], times["plain"]) for name in ("noop", "record", "steer")}
    gain = summary(swept["sweep_one_by_one"], swept["sweep_at_once"])
    ratios["sweep_batch"] = summary(swept["sweep_at_once"], swept["batch"])
    result = {
        "benchmark": "engine",
        "environment": environment(),
        "model": Path(options.model).name,
        "weights": "random" if options.untrained else "trained",
        "pictures": options.pictures,
        "steps": options.steps,
        "sites": len(job.sites),
        "rounds": {"engine": len(times["plain"]), "sweep": len(swept["sweep_at_once"])},
        "rounds_left_out": {"engine": left_out, "sweep": left_out_too},
        "seconds": {name: summary(each) for name, each in {**times, **swept}.items()},
        "ratio": {**ratios, "sweep": gain},
        "goals": GOALS,
    }
    show(result)
    print(write(result, options.output or f"engine-{Path(options.model).name}"))
    return 0


def show(result: dict[str, Any]) -> None:
    seconds = result["seconds"]["plain"]["median"]
    print(f"{result['pictures']} pictures, {result['steps']} steps: {seconds:.2f} s")
    for name, ratio in result["ratio"].items():
        goal = f"   goal {GOALS[name]}" if name in GOALS else ""
        print(f"{name:11s} x{ratio['median']:.3f} [{ratio['q20']:.3f}, {ratio['q80']:.3f}]{goal}")
    if -1 in result["rounds_left_out"].values():
        print("too few quiet rounds: other processes ran, so these figures say little")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes-unet", help="embedded model or pipeline folder")
    parser.add_argument(
        "--untrained", action="store_true", help="random weights; times are the same"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
