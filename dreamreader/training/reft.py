"""Adapters from a spec file."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from dreamreader._files import explain_disk_errors
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.jobs import fingerprint
from dreamreader.jobs.fingerprint import portable
from dreamreader.jobs.job import REPORT, RunUnit, SpecJob, Work
from dreamreader.reft import Reft
from dreamreader.specs.batch import activation_bytes, rows_that_fit
from dreamreader.specs.data import read_items
from dreamreader.specs.subject import call_settings, is_language, open_subject, with_padding
from dreamreader.training.examples import Examples, examples_of, folder_of
from dreamreader.training.fit import FittedAdapters, fit_adapters, orthonormality
from dreamreader.training.folder import ADAPTER, CHECKPOINTS, HISTORY, RESULT, TrainingFolder
from dreamreader.training.losses import AdaptedSites
from dreamreader.training.plan import ROWS, ReftPlan, plan_of
from dreamreader.training.reft_page import explained_share, parameters, write_report
from dreamreader.training.specs import ReftSpec as ReftSpec


class ReftJob(SpecJob[ReftSpec]):
    """Trains the adapters of a spec.

    Args:
        spec: a `ReftSpec`, or its content as a mapping; or give the fields by name.
        reader: a subject of your own; `subject` then only names it.
        home: what relative names of pictures are meant from, where `data` are no file.

    Raises:
        InvalidInput: a field cannot be right.

    Example:
        >>> job = ReftJob.from_file("examples/reft/frame.yaml", ["seeds.count=2"])
        >>> fitted = job.run("frame")  # doctest: +SKIP
        >>> result = reader.run("a blue star", edits=fitted.edits(branch="cond"))  # doctest: +SKIP
    """

    kind, model, folder_type = "reft", ReftSpec, TrainingFolder

    @cached_property
    def examples(self) -> Examples:
        """What it is trained on."""
        spec = self.spec
        items, folder = read_items(spec.data), folder_of(spec.data, self._home)
        return examples_of(spec.training, items, spec.seed_list, folder)

    @cached_property
    def reader(self) -> Reader:
        """Of the subject, opened at first use."""
        found = with_padding(self._reader or open_subject(self.spec.subject))
        if is_language(found) and self.spec.pipeline:
            raise InvalidInput("pipeline: a language model reads texts here, and writes none")
        return found

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Arguments of the subject's call."""
        if is_language(self.reader):
            return {}
        return call_settings(self.reader, self.spec.subject, self.spec.pipeline)

    def place(self, batch: int) -> AdaptedSites:
        spec = self.spec
        return AdaptedSites(self.reader, spec.sites, spec.branch, spec.tokens, self.settings, batch)

    @property
    def row_bytes(self) -> int:
        """Bytes of activations of one row, from running one for a step."""
        changes: dict[str, Any] = dict(self.settings)
        if not is_language(self.reader):
            changes |= {"num_inference_steps": 1, "output_type": "latent"}
        prompt = self.examples.prompts[0]
        return activation_bytes(
            self.reader.subject, lambda: self.reader.run(prompt, seeds=0, progress=False, **changes)
        )

    def plan(self) -> ReftPlan:
        """Sites, parameters, calls, and what they will take; a few are run."""
        row_bytes = self.row_bytes  # first: a first run takes longer
        return plan_of(self.spec.training, self.place(ROWS), self.examples, row_bytes)

    def begin(self, folder: TrainingFolder) -> int:
        """Rows of a call, as the folder has it from before; checks that it is of this job."""
        plan = folder.plan()
        auto = self.spec.batch.rows == "auto"
        batch = (
            plan["batch"] if plan else rows_that_fit(self.spec.batch, self.row_bytes if auto else 0)
        )
        shown = self.spec.model_dump(mode="json", exclude={"name", "data", "seeds", "batch"})
        pictures = self.spec.training.loss == "denoising"
        settings = {
            "spec": portable(shown),
            "examples": self.examples.digest(pictures),
            "batch": batch,
        }
        reader = self.reader
        taken = fingerprint(reader.subject, settings, self.examples.seeds, reader.tokenizer)
        folder.begin(self.spec, taken, {"batch": batch})
        return batch

    def units(self, plan: int) -> int:
        return 1

    def units_there(self, folder: TrainingFolder, plan: int) -> set[int]:
        return {0} if folder.is_complete else set()

    @contextmanager
    def open_runner(self, work: Work) -> Iterator[RunUnit]:
        folder: TrainingFolder = work.folder

        def train_all(unit: int, room: int | None) -> int:
            with explain_disk_errors(folder.path):
                found = fit_adapters(
                    self.spec.training,
                    self.place(work.plan),
                    self.examples,
                    folder.path / CHECKPOINTS,
                    work.report,
                )
                _keep(folder, found)
            return 0

        yield train_all

    def finish(self, work: Work) -> None:
        """Nothing is left: the unit is the result."""

    def clear(self, work: Work) -> None:
        work.folder.clear(CHECKPOINTS)

    def result(self, folder: TrainingFolder) -> Reft:
        """The adapters, on the CPU."""
        return Reft.load(folder.path / ADAPTER)

    @classmethod
    def write_report(cls, folder: TrainingFolder) -> Path:
        return write_report(cls.of_folder(folder.path).spec, folder)

    @classmethod
    def results(cls, folder: TrainingFolder) -> Mapping[str, Any]:
        return folder.numbers()

    @classmethod
    def summary(cls, folder: TrainingFolder) -> list[str]:
        folder.need_complete()
        result, name = folder.need(RESULT), cls.of_folder(folder.path).spec.name
        share, prompts = explained_share(result), result["prompts"]
        lines = [
            f"{name}: {parameters(result):,} parameters at {len(result['sites'])} sites, best at "
            f"step {result['best']:,} of {result['steps']:,}"
        ]
        if share is not None:
            lines.append(
                f"{100 * share:.1f} % of the difference explained on {prompts['held_out']:,} "
                f"held-out prompts, {prompts['trained']:,} trained"
            )
        return [*lines, f"report: {(folder.path / REPORT).resolve()}"]

    def __repr__(self) -> str:
        spec = self.spec
        return f"ReftJob({spec.name!r}: {spec.training.variant} of {spec.subject.model})"


def _keep(folder: TrainingFolder, found: FittedAdapters) -> None:
    """Writes adapters, history and, last, the result."""
    history, apart = found.history, orthonormality(found.reft)
    found.reft.save(folder.path / ADAPTER)
    validated = dict(history.validation)
    lines = [
        json.dumps({"step": step, "loss": loss, "validation": validated.get(step)})
        for step, loss in enumerate(history.losses, 1)
    ]
    folder.write_text(HISTORY, "\n".join(lines) + "\n")
    sites = {
        site: {
            "width": adapter.width,
            "rank": adapter.rank,
            "parameters": sum(each.numel() for each in adapter.parameters()),
            "orthonormality": apart[site],
        }
        for site, adapter in found.reft.adapters.items()
    }
    result = {
        "steps": len(history.losses),
        "best": history.best,
        "stopped": history.stopped,
        "prompts": {"trained": found.trained, "held_out": found.held},
        "model_parameters": found.reft.of,
        "sites": sites,
        "held_out": {name: list(each) for name, each in found.held_out.items()},
        "explained": found.explained,
    }
    folder.complete(result, [ADAPTER, HISTORY])
