"""Running the batches of an experiment, and what a run folder is of."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.experiments.folder import FORMAT, RunFolder
from dreamreader.experiments.job import Job
from dreamreader.experiments.plan import ExperimentPlan, make_plan
from dreamreader.experiments.row import Row, RowBatch
from dreamreader.jobs import fingerprint
from dreamreader.jobs.fingerprint import portable
from dreamreader.metrics import Outputs


def check_metrics(job: Job) -> None:
    """Refuses, before anything is computed, a report that could not be written."""
    method = job.spec.method
    if not job.metrics and hasattr(method, "effect"):
        raise InvalidInput(
            f"metrics: method {method.kind} compares its conditions by a metric that gives "
            "numbers, and there is none; name one, such as pixel_distance"
        )


def begin(job: Job, folder: RunFolder) -> ExperimentPlan:
    """The plan of a folder: that of the run that began there, or a new one."""
    job.use_folder(folder)
    before = folder.plan()
    _check_version(folder, before)
    plan = make_plan(job, None if before is None else before["batch"], estimates=False)
    reader = job.reader
    taken = fingerprint(reader.subject, _settings(job, plan), job.seeds, reader.tokenizer)
    listed = [[unit.start, unit.stop] for unit in plan.units]
    folder.begin(job.spec, taken, {"format": FORMAT, "batch": job.batch, "units": listed})
    if before is not None and before["units"] != listed:
        raise InvalidInput(f"{folder.path}/plan.json does not fit its spec; give another folder")
    return plan


def compute(
    job: Job, unit: RowBatch, keep: bool = True
) -> tuple[list[dict[str, Any]], list[str], list[dict[str, Any]]]:
    """Runs one batch: its rows, the columns that were measured, what fired.

    Args:
        keep: whether its pictures and what later rows are compared with are written.
    """
    rows = unit.of(job.rows)
    outputs, result = job.run_batch(rows)
    columns = dict(job.spec.method.columns(job, rows, result))
    compared = references(job, rows, outputs)
    for metric in job.metrics:
        measured = metric.measure(outputs, compared if metric.compares else None)
        _check_columns(metric.name, measured, columns, len(rows))
        columns |= measured
    if keep:
        keep_references(job, unit, rows, outputs)
        keep_images(job, rows, outputs)
    found = []
    for number, row in enumerate(rows):
        text = {} if outputs.text is None else {"text": outputs.text[number]}
        given = {**row.columns(), "unit": unit.number, **text, "digest": _digest(outputs, number)}
        taken = [name for name in columns if name in given]
        if taken:
            raise InvalidInput(
                f"a metric gives the column {taken[0]!r}, which every row has already; rename it"
            )
        found.append({**given, **{name: _plain(each[number]) for name, each in columns.items()}})
    return (
        found,
        list(columns),
        [_firing_row(line) for line in result.firing if line.kind == "edit"],
    )


def _check_columns(
    name: str, measured: Mapping[str, Any], known: Mapping[str, Any], count: int
) -> None:
    """Refuse columns that another metric gave, or that do not have a value for each row."""
    for column, values in measured.items():
        if column in known:
            raise InvalidInput(f"metrics: {name} gives the column {column!r}, which is there twice")
        if len(values) != count:
            raise InvalidInput(
                f"metrics: {name} gives {len(values)} values of {column} for {count} rows"
            )


def keep_images(job: Job, rows: Sequence[Row], outputs: Outputs) -> None:
    """Writes the pictures of a batch as files."""
    if job.spec.save.images and outputs.images is not None and job.folder is not None:
        for row, image in zip(rows, outputs.images, strict=True):
            job.folder.keep_image(row.number, image)


# What rows are compared with: the outputs of their base rows, as exact as they were.


def keep_references(job: Job, unit: RowBatch, rows: Sequence[Row], outputs: Outputs) -> None:
    """Keeps what later rows of this run will be compared with."""
    if not any(metric.compares for metric in job.metrics):
        return
    kept = [n for n, row in enumerate(rows) if row.number in job.bases]
    if not kept:
        return
    tensors = {
        "rows": torch.tensor([rows[n].number for n in kept]),
        **_tensors(outputs, kept),
    }
    assert job.folder is not None
    job.folder.keep_tensors(f"references/{unit.number:06d}", tensors)
    job.memory.setdefault("references", {})[unit.number] = tensors


def references(job: Job, rows: Sequence[Row], outputs: Outputs) -> Outputs | None:
    """Outputs of the base row of every row; a row without one is compared with itself."""
    if not any(metric.compares for metric in job.metrics):
        return None
    own = [_tensors(outputs, n) for n in range(len(rows))]
    found = []
    for row in rows:
        base = row.number if row.base is None else row.base
        inside = base - rows[0].number
        found.append(own[inside] if inside >= 0 else _reference(job, base))
    stacked = {name: torch.stack([each[name] for each in found]) for name in own[0]}
    columns = [(row if row.base is None else job.rows[row.base]).columns() for row in rows]
    return Outputs(
        columns,
        stacked.get("images"),
        stacked.get("latents"),
        {int(name[6:]): v for name, v in stacked.items() if name.startswith("noise.")},
        stacked.get("logits"),
        tokenizer=job.reader.tokenizer,
    )


def _tensors(outputs: Outputs, rows: Any) -> dict[str, Tensor]:
    """The tensors of some rows, or of one, by name."""
    names = ("images", "latents", "logits")
    found = {name: getattr(outputs, name) for name in names}
    found |= {f"noise.{step}": value for step, value in outputs.noise.items()}
    return {name: value[rows] for name, value in found.items() if value is not None}


def _reference(job: Job, number: int) -> dict[str, Tensor]:
    """What a base row of an earlier batch gave.

    Raises:
        InvalidInput: the folder lacks it.
    """
    unit = job.unit_of(number)
    memory = job.memory.setdefault("references", {})
    assert job.folder is not None
    if unit.number not in memory:
        memory[unit.number] = job.folder.tensors(f"references/{unit.number:06d}")
    tensors = memory[unit.number]
    if tensors is None:
        raise InvalidInput(
            f"{job.folder.path}/artifacts/references/{unit.number:06d}.safetensors is missing; "
            f"delete rows/batch-{unit.number:06d}.parquet and run again"
        )
    at = tensors["rows"].tolist().index(number)
    return {name: value[at] for name, value in tensors.items() if name != "rows"}


def _settings(job: Job, plan: ExperimentPlan) -> dict[str, Any]:
    """All that the numbers depend on: the spec with its defaults, the prompts, and the batches."""
    items = [[item.id, item.prompt, item.target, dict(item.columns)] for item in job.items]
    text = repr(items).encode()
    return {
        "spec": portable(job.spec.model_dump(mode="json", exclude={"name", "save"})),
        "prompts": hashlib.sha256(text).hexdigest(),
        "inputs": job.spec.method.inputs(job),
        "metrics": [metric.name for metric in job.metrics],
        "batches": [[unit.start, unit.stop] for unit in plan.units],
    }


def _check_version(folder: RunFolder, plan: Any) -> None:
    if plan is not None and plan.get("format") != FORMAT:
        raise InvalidInput(
            f"{folder.path} was written in format {plan.get('format')}, this version writes "
            f"{FORMAT}: give another folder"
        )


def _digest(outputs: Outputs, number: int) -> str:
    """SHA-256 of what a row gave, to the bit: pictures, else logits, else text."""
    for value in (outputs.images, outputs.logits):
        if value is not None:
            flat = value[number].detach().cpu().contiguous()
            return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
    return hashlib.sha256((outputs.text or [""])[number].encode()).hexdigest()


def _firing_row(line: Any) -> dict[str, Any]:
    from dreamreader.engine import ranges

    return {
        "request": line.request,
        "site": line.site,
        "calls": line.calls,
        "passed_over": line.passed_over,
        "steps": ranges(line.steps),
        "branches": sorted(line.branches),
        "rows": len(line.rows),
        "notes": list(line.notes),
    }


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
