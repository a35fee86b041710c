"""The demo from the first recording to the written report."""

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dreamreader._files import write_atomic
from dreamreader.demo import data, directions, patch, remove, steer
from dreamreader.demo.bench import Bench
from dreamreader.demo.plan import WINDOWS, Plan
from dreamreader.jobs import Fingerprint, fingerprint
from dreamreader.steering import LabelMeans

if TYPE_CHECKING:
    from rich.progress import Progress

    from dreamreader.engine import Reader


@dataclass(frozen=True)
class Result:
    """Everything that the demo found; `page.build` makes the report of it."""

    plan: Plan
    places: list[directions.Place]
    means: LabelMeans
    points: list[steer.Point]
    finalists: list[steer.Point]
    best: steer.Point
    confirmed: steer.Confirmation
    removal: remove.Removal
    patching: patch.Patching
    fired: list[tuple[str, Any]]
    fingerprint: Fingerprint
    pictures: int
    seconds: float

    @property
    def best_place(self) -> directions.Place:
        return next(place for place in self.places if place.name == self.best.place)

    def summary(self) -> str:
        """The result in four lines."""
        plan, found = self.plan, self.confirmed.outcomes
        lines = [
            f"{plan.source} to {plan.target} on {plan.test} held-out rows, at {self.best.place}, "
            f"{self.best.window}, strength {self.best.strength:g} (95 % intervals):"
        ]
        for name in ("direction", "random", "no edit", "prompt"):
            turned, kept = (found[name].share(key).percent() for key in ("turned", "kept"))
            lines.append(f"  {name:<10} {plan.target} in {turned}; shape and place kept in {kept}")
        return "\n".join([*lines, f"{self.pictures} pictures in {self.seconds:.0f} s"])

    def as_dict(self) -> dict[str, Any]:
        """All numbers as plain values, for results.json."""
        best = self.best
        return {
            "fingerprint": self.fingerprint.as_dict(),
            "chosen": {"place": best.place, "window": best.window, "strength": best.strength},
            "test": {name: found.as_dict() for name, found in self.confirmed.outcomes.items()},
            "curve": {
                name: [{"strength": s, **found.as_dict()} for s, found in line]
                for name, line in self.confirmed.curve.items()
            },
            "explained": {site: self.means.explained(site).tolist() for site in self.means.sites},
            "sweep": [_point(point) for point in self.points],
            "finalists": [_point(point) for point in self.finalists],
            "removal": {name: found.as_dict() for name, found in self.removal.outcomes.items()},
            "patching": [
                {"place": place, "window": window, "effect": cell.as_dict()}
                for place, line in zip(self.patching.places, self.patching.effect, strict=True)
                for window, cell in zip(self.patching.windows, line, strict=True)
            ],
            "pictures": self.pictures,
        }


def run_demo(reader: "Reader", plan: Plan, out: Path, progress: "Progress | None" = None) -> Result:
    """Records, fits, steers, removes, patches, measures, and writes report.html and results.json.

    Args:
        reader: a pipeline of the embedded world with a UNet.
        plan: sizes and settings.
        out: folder of report.html, results.json and edits/; its files appear whole, at the end.
        progress: where to show how far it is.

    Returns:
        What was found.

    Raises:
        InvalidInput: the subject has no UNet, or the plan does not fit the embedded world.
    """
    from dreamreader.demo import page
    from dreamreader.edits import save

    start = time.perf_counter()
    stage = _stages(progress)
    bench = Bench(reader, plan)
    rows = data.split(plan)
    places = directions.find_places(bench)
    sites = places[-1].sites
    with torch.inference_mode():
        with stage("record pairs", bench, plan.fit * 8):
            means = directions.record(bench, rows.fit, directions.find_readings(bench))
        found = {
            place.name: directions.difference(means, place, plan.source, plan.target)
            for place in places
        }
        settings = len(plan.strengths) * len(WINDOWS)
        with stage("steer", bench, plan.choose * (1 + len(places) * settings)):
            points = steer.sweep(bench, rows.choose, places, found)
        with stage("refine", bench, plan.refine * (1 + plan.finalists)):
            finalists = steer.refine(bench, rows.refine, places, found, points)
        best = steer.choose(finalists)
        place = next(each for each in places if each.name == best.place)
        more = (len(plan.strengths) - 1) * min(plan.curve, plan.test)
        with stage("measure", bench, 4 * plan.test + 2 * more):
            confirmed = steer.confirm(bench, rows.test, place, best, found[place.name])
        with stage("remove", bench, 3 * plan.curve):
            removal = remove.remove(bench, rows.test[: plan.curve], places[-1], means)
        with stage("patch", bench, plan.patch * (2 + len(places) * (plan.windows + 1))):
            patching = patch.patch(bench, rows.patch, places)
    result = Result(
        plan, places, means, points, finalists, best, confirmed, removal, patching, bench.fired,
        fingerprint(reader.subject, {"plan": plan, "sites": list(sites)}, _seeds(rows)),
        bench.pictures, time.perf_counter() - start,
    )  # fmt: skip
    edit = steer.steer(bench, place, found[place.name], best.window, [best.strength])
    save(out / "edits" / f"{plan.source}-to-{plan.target}.safetensors", edit)
    write_atomic(out / "results.json", json.dumps(result.as_dict(), indent=1, allow_nan=True))
    page.build(result).write(out / "report.html")
    return result


def _point(point: steer.Point) -> dict[str, Any]:
    place = {"place": point.place, "window": point.window, "strength": point.strength}
    return place | point.outcome.as_dict()


def _seeds(rows: data.Split) -> list[int]:
    parts = (rows.fit, rows.choose, rows.refine, rows.test, rows.patch)
    return [row.seed for part in parts for row in part]


def _stages(progress: "Progress | None") -> Callable[..., Any]:
    """A context manager per stage; on a display, a bar that counts pictures."""

    @contextmanager
    def stage(name: str, bench: Bench, pictures: int):
        if progress is None:
            yield
            return
        task = progress.add_task(name, total=pictures)
        bench.advance = partial(progress.advance, task)
        yield
        progress.update(task, completed=pictures, total=pictures)

    return stage
