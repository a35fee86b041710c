"""The demo as a chain of jobs, each of which takes what the earlier ones have found."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dreamreader._files import write_atomic
from dreamreader._progress import Progress, ProgressCallback, ProgressEvent, show_progress
from dreamreader.demo import page
from dreamreader.demo.plan import DemoPlan
from dreamreader.demo.result import DemoResult, Setting, settings
from dreamreader.edits import save
from dreamreader.errors import InvalidInput
from dreamreader.experiments import Results
from dreamreader.jobs.kinds import job_type
from dreamreader.specs.data import read_items
from dreamreader.specs.parts import Data
from dreamreader.steering import Directions, LabelMeans
from dreamreader.zoo import scenes

if TYPE_CHECKING:
    from dreamreader.engine import Reader
    from dreamreader.store import Store


@dataclass
class _Chain:
    """Runs the jobs of a demo in folders of one folder, where stopped ones go on."""

    reader: "Reader"
    plan: DemoPlan
    out: Path
    report: ProgressCallback
    jobs: dict[str, Any] = field(default_factory=dict)

    def run(self, name: str, spec: Any, rows: int | None = None) -> Any:
        job, folder = job_type(spec.kind)(spec, reader=self.reader), self.out / name
        found = job.run(folder, progress=partial(self._tell, name))
        digest = job.folder_type(folder).run
        self.jobs[name] = {"fingerprint": digest, "rows": rows or len(found.rows)}
        return found

    def _tell(self, name: str, event: ProgressEvent) -> None:
        self.report(replace(event, stage=name, text="", note=""))


def run_demo(reader: "Reader", plan: DemoPlan, out: Path, progress: Progress = True) -> DemoResult:
    """Records, fits, steers, removes, patches, measures, and writes report.html and results.json.

    Args:
        reader: a pipeline of the embedded world with a UNet.
        plan: what is done.
        out: folder of report.html, results.json, edits/, directions/ and a folder for each job. A
            demo that was stopped goes on there.
        progress: shown by default, or a function of a `ProgressEvent`, or False.

    Returns:
        What was found.

    Raises:
        InvalidInput: the subject has no UNet, or a folder in `out` is of another demo.
    """
    start = time.perf_counter()
    places = find_places(reader)
    with show_progress(progress) as report:
        chain = _Chain(reader, plan, Path(out), report)
        means = _record(chain)
        files = _directions(means, plan, chain.out / "directions", places["all blocks"])
        along = {"directions.file": files["direction"]}
        sweep = chain.run("sweep", plan.spec("sweep", {**along, "group": places}))
        chosen = sorted(settings(sweep), key=lambda each: each.rank, reverse=True)[: plan.finalists]
        refined = chain.run("refine", _refine(plan, chosen, files["direction"]))
        finalists = _add_rows(chosen, refined)
        best = max(finalists, key=lambda each: each.rank)
        at = {
            "group": {best.cell.name: best.cell.sites},
            "sites": best.cell.sites,
            "windows": [best.cell.steps],
            **along,
        }
        test = chain.run("test", plan.spec("test", {**at, "strengths": [best.strength]}))
        others = [each for each in sweep.spec.method.strengths if each != best.strength]
        dose = chain.run("dose", plan.spec("dose", {**at, "strengths": others}))
        contrast = {"edits.0.direction.file": files["contrast"]}
        removal = chain.run("remove", plan.spec("remove", contrast))
        patching = chain.run("patch", plan.spec("patch", {"group": places}))
    result = DemoResult(
        plan, means, sweep, refined, finalists, best, test, dose, removal, patching, chain.jobs,
        time.perf_counter() - start,
    )  # fmt: skip
    directions = Directions.load(files["direction"]).only(*best.cell.sites)
    edit = directions.steer(best.strength, steps=best.cell.window, branch="cond")
    save(chain.out / "edits" / f"{plan.source}-to-{plan.target}.safetensors", edit)
    write_atomic(chain.out / "results.json", json.dumps(result.as_dict(), indent=1, allow_nan=True))
    page.build(result).write(chain.out / "report.html")
    return result


def find_places(reader: "Reader") -> dict[str, list[str]]:
    """The cross-attentions of the denoiser, block by block, and all of them together.

    Raises:
        InvalidInput: the subject has no UNet with cross-attention.
    """
    if not hasattr(reader.subject, "unet"):
        kind = type(reader.subject).__name__
        raise InvalidInput(
            f"the demo needs a pipeline with a UNet of the embedded world, got {kind}"
        )
    sites = reader.sites("unet.**.attn2").names
    blocks: dict[str, list[str]] = {}
    for site in sites:
        blocks.setdefault(site.removeprefix("unet.").partition(".attentions")[0], []).append(site)
    return {**blocks, "all blocks": list(sites)}


def _record(chain: _Chain) -> LabelMeans:
    """Draws every scene in every colour; the same noise serves all colours of a scene."""
    spec, source = chain.plan.spec("record"), f" {chain.plan.source} "
    prompts = [
        {"prompt": item.prompt.replace(source, f" {color} "), "color": color}
        for color in scenes.COLORS
        for item in read_items(spec.data)
    ]
    rows = len(prompts) * len(spec.seed_list)
    spec = spec.model_copy(update={"data": Data.model_validate({"prompts": prompts})})
    return label_means(chain.run("record", spec, rows), "color")


def label_means(store: "Store", column: str) -> LabelMeans:
    """Means by a column of the samples, of a store with one row for each sample, site and step."""
    means = LabelMeans()
    for site in store.sites:
        found = store.read(site)
        keys = found.keys.select(["unit", "sample", "step", column])
        order = keys.append_column("row", [range(len(keys))]).sort_by(
            [(name, "ascending") for name in ("unit", "sample", "step")]
        )
        values = found.values[torch.tensor(order["row"].to_pylist())]
        steps = len(store.steps)
        labels = order[column].to_pylist()[::steps]
        means.add({site: values.unflatten(0, (len(labels), steps))}, labels)
    return means


def _directions(
    means: LabelMeans, plan: DemoPlan, folder: Path, sites: Sequence[str]
) -> Mapping[str, str]:
    """Files of the two directions: from source to target, and what is special about the source."""
    vectors = {
        "direction": {site: means.difference(site, plan.source, plan.target) for site in sites},
        "contrast": {site: means.contrast(site, plan.source) for site in sites},
    }
    ends = {"direction": (plan.source, plan.target), "contrast": ("other colours", plan.source)}
    files = {name: folder / f"{name}.safetensors" for name in vectors}
    for name, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        Directions(vectors[name], *ends[name], "mean", "none").save(file)
    return {name: str(file.resolve()) for name, file in files.items()}


def _refine(plan: DemoPlan, chosen: Sequence[Setting], file: str) -> Any:
    """The spec that draws some settings on more scenes."""
    axes = {
        "site": [list(each.cell.sites) for each in chosen],
        "window": [each.cell.steps for each in chosen],
        "alpha": [each.strength for each in chosen],
    }
    return plan.spec("refine", {"sweep": axes, "edits.0.direction.file": file})


def _add_rows(chosen: Sequence[Setting], refined: Results) -> list[Setting]:
    """The settings with the rows of both sets of scenes."""
    rows, count = refined.of("edited"), len(refined.of("unedited"))
    return [
        replace(each, rows=[*each.rows, *rows[n * count : (n + 1) * count]])
        for n, each in enumerate(chosen)
    ]
