"""The demo from the first recording to the written report."""

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dreamreader._files import write_atomic
from dreamreader.demo import data, directions, page, patch, remove, steer
from dreamreader.demo.bench import Bench
from dreamreader.demo.plan import WINDOWS, DemoPlan
from dreamreader.demo.result import DemoResult
from dreamreader.edits import save
from dreamreader.jobs import fingerprint

if TYPE_CHECKING:
    from rich.progress import Progress

    from dreamreader.engine import Reader


def run_demo(
    reader: "Reader", plan: DemoPlan, out: Path, progress: "Progress | None" = None
) -> DemoResult:
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
    result = DemoResult(
        plan, places, means, points, finalists, best, confirmed, removal, patching, bench.fired,
        fingerprint(reader.subject, {"plan": plan, "sites": list(sites)}, _seeds(rows)),
        bench.pictures, time.perf_counter() - start,
    )  # fmt: skip
    edit = steer.steer(bench, place, found[place.name], best.window, [best.strength])
    save(out / "edits" / f"{plan.source}-to-{plan.target}.safetensors", edit)
    write_atomic(out / "results.json", json.dumps(result.as_dict(), indent=1, allow_nan=True))
    page.build(result).write(out / "report.html")
    return result


def _seeds(rows: data.SceneSplit) -> list[int]:
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
