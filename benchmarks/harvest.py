"""What harvesting activations to disk adds to generating the same pictures.

    python benchmarks/harvest.py [--model shapes-unet] [--pictures 32] [--batch 16] [--rounds 7]

Every attention output of all steps, bfloat16, a random quarter of the tokens, to the disk that
holds --folder; against the plain pipeline with the same prompts, seeds and batches. Neither decodes
pictures. `run` is the whole job, from the size of its units to its index; `units` its units alone,
which is what a long job is made of. No time is printed unless stored rows are those that a plain
recording gives.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from paired import environment, interleaved, summary, write

import dreamreader as dr
from dreamreader.harvest.plan import Plan, make_plan
from dreamreader.harvest.run import harvest_unit
from dreamreader.store import Store
from dreamreader.store.writer import open_writer

SITES = ["unet.**.attn1", "unet.**.attn2"]
GOAL = 1.05


class Job:
    """One harvest, and the plain pipeline beside it."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.harvest = dr.Harvest(
            name="benchmark",
            subject={"model": options.model, "device": options.device},
            data={"scenes": {"count": options.pictures}},
            pipeline={"num_inference_steps": options.steps},
            capture=[{"sites": SITES, "tokens": {"random": 0.25}}],
            batch={"rows": options.batch},
        )
        self.job = self.harvest.job
        self.plan: Plan = make_plan(self.job, estimates=False)
        self.folder = folder
        self.writer = open_writer(folder / "units", run="0" * 64)
        self.store: Store | None = None

    def plain(self) -> None:
        items, seeds = self.job.read(0, self.job.samples)
        with torch.inference_mode():
            for first in range(0, len(items), self.plan.batch):
                part = slice(first, first + self.plan.batch)
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
                prompts = [item.prompt for item in items[part]]
                self.job.reader.subject(prompts, generator=generators, **self.job.settings)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def units(self) -> None:
        shutil.rmtree(self.folder / "units", ignore_errors=True)
        for unit in range(self.plan.units):
            harvest_unit(self.job, self.plan, unit, [self.writer])

    def run(self) -> None:
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        self.store = self.harvest.run(self.folder / "run")

    def problems(self) -> list[str]:
        """In words, what is not as it must be."""
        self.run()
        assert self.store is not None
        items, seeds = self.job.read(0, self.plan.batch)
        site = self.job.sites[0]
        with torch.inference_mode():
            prompts = [item.prompt for item in items]
            cache = self.job.reader.run(prompts, record=site, seeds=seeds, **self.job.settings)
        found, recorded = self.store.read(site), cache.cache[site]
        numbers = {item.id: n for n, item in enumerate(items)}
        wrong = 0
        for key, value in zip(found.keys.to_pylist(), found.values, strict=True):
            if key["id"] in numbers:
                branch = recorded.branches.index(key["branch"])
                row = recorded.tensor[numbers[key["id"]], branch, key["step"], key["token"]]
                wrong += not torch.equal(row.bfloat16(), value)
        return [f"{site}: {wrong} stored rows are not those of a recording"] if wrong else []


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        job = Job(options, Path(folder))
        found = job.problems()
        if found:
            print("no times, since these checks failed:", *found, sep="\n  ", file=sys.stderr)
            return 1
        assert job.store is not None
        sizes = {"sites": len(job.store.sites), "rows": job.store.rows, "bytes": job.store.nbytes}
        calls = {"plain": job.plain, "units": job.units, "run": job.run}
        times, left_out = interleaved(calls, options.rounds)
        job.writer.close()
    result: dict[str, Any] = {
        "benchmark": "harvest",
        "environment": environment(),
        "model": options.model,
        "pictures": options.pictures,
        "steps": options.steps,
        **sizes,
        "rounds": len(times["plain"]),
        "rounds_left_out": left_out,
        "seconds": {name: summary(each) for name, each in times.items()},
        "ratio": {name: summary(times[name], times["plain"]) for name in ("units", "run")},
        "goal": GOAL,
    }
    show(result)
    print(write(result, options.output or f"harvest-{options.model}"))
    return 0


def show(result: dict[str, Any]) -> None:
    seconds = result["seconds"]
    print(
        f"{result['pictures']} pictures, {result['steps']} steps: {seconds['plain']['median']:.2f} "
        f"s; {result['rows']:,} rows of {result['sites']} sites, {result['bytes'] / 1e6:.0f} MB"
    )
    for name, ratio in result["ratio"].items():
        shown = f"x{ratio['median']:.3f} [{ratio['q20']:.3f}, {ratio['q80']:.3f}]"
        print(f"{name:6s} {shown}   goal {GOAL}")
    if result["rounds_left_out"] == -1:
        print("too few quiet rounds: other processes ran, so these figures say little")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes-unet", help="embedded model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="on the disk to write to; default: temporary")
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
