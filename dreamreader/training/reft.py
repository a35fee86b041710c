"""Adapters from a spec file."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from dreamreader._files import explained
from dreamreader.errors import InvalidInput
from dreamreader.jobs import fingerprint
from dreamreader.jobs.fingerprint import portable
from dreamreader.reft import Reft
from dreamreader.specs import parts
from dreamreader.specs.batch import activation_bytes, rows_that_fit
from dreamreader.specs.data import read_items
from dreamreader.specs.load import load_spec, spec_of
from dreamreader.specs.subject import call_settings, is_language, opened, padded
from dreamreader.training.examples import Examples, examples_of, folder_of
from dreamreader.training.fit import Fitted, Told, fitted, orthonormality
from dreamreader.training.folder import TrainingFolder
from dreamreader.training.losses import Place
from dreamreader.training.parts import Training

if TYPE_CHECKING:
    from dreamreader.engine import Reader
    from dreamreader.training.plan import ReftPlan

ADAPTER, HISTORY = "adapter.safetensors", "history.jsonl"
_CHECKPOINTS = "checkpoint"  # folder, until the training is complete


class ReftSpec(parts.Common):
    """Adapters: subject, pairs of prompts (or completions, or pictures), sites, training."""

    sites: str | list[str] = Field(min_length=1, description="Site strings or globs.")
    branch: str = Field("cond", description="Guidance branch that is trained and edited.")
    tokens: int | list[int] | None = Field(None, description="Which tokens are edited; all.")
    training: Training = Field(default_factory=Training)

    @model_validator(mode="after")
    def _rows(self) -> "ReftSpec":
        if self.training.loss in ("language", "denoising") and self.data.scenes is not None:
            raise ValueError(
                f"data.scenes: the loss {self.training.loss} needs a column that scenes have not"
            )
        return self


class ReftJob:
    """Trains the adapters of a spec.

    Args:
        spec: a `ReftSpec`, or its content as a mapping; or give the fields by name.
        reader: a subject of your own; `subject` then only names it.
        home: what relative names of pictures are meant from, where `data` are no file.

    Raises:
        InvalidInput: a field cannot be right.

    Example:
        >>> job = ReftJob.from_file("examples/reft/frame.yaml", ["seeds=2"])
        >>> fitted = job.run("frame")  # doctest: +SKIP
        >>> result = reader.run("a blue star", edits=fitted.edits(branch="cond"))  # doctest: +SKIP
    """

    def __init__(
        self,
        spec: ReftSpec | Mapping[str, Any] | None = None,
        *,
        reader: "Reader | None" = None,
        home: Path | None = None,
        **fields: Any,
    ):
        self._reader, self._home = reader, home
        self.spec = spec_of(ReftSpec, spec, fields, reader, "ReftJob")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> "ReftJob":
        """Reads a spec file; see `specs.load.load_spec`."""
        return cls(load_spec(ReftSpec, path, overrides), home=Path(path).parent)

    @cached_property
    def examples(self) -> Examples:
        """What it is trained on."""
        spec = self.spec
        items, folder = read_items(spec.data), folder_of(spec.data, self._home)
        return examples_of(spec.training, items, spec.seed_list, folder)

    @cached_property
    def reader(self) -> "Reader":
        """Of the subject, opened at first use."""
        found = padded(self._reader or opened(self.spec.subject))
        if is_language(found) and self.spec.pipeline:
            raise InvalidInput("pipeline: a language model reads texts here, and writes none")
        return found

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Arguments of the subject's call."""
        if is_language(self.reader):
            return {}
        return call_settings(self.reader, self.spec.subject, self.spec.pipeline)

    def place(self, batch: int) -> Place:
        spec = self.spec
        return Place(self.reader, spec.sites, spec.branch, spec.tokens, self.settings, batch)

    @property
    def row_bytes(self) -> int:
        """Bytes of activations of one row, from running one for a step."""
        changes: dict[str, Any] = dict(self.settings)
        if not is_language(self.reader):
            changes |= {"num_inference_steps": 1, "output_type": "latent"}
        prompt = self.examples.prompts[0]
        return activation_bytes(
            self.reader.subject, lambda: self.reader.run(prompt, seeds=0, **changes)
        )

    def plan(self) -> "ReftPlan":
        """Sites, parameters, calls, and what they will take; a few are run."""
        from dreamreader.training.plan import plan_of

        return plan_of(self)

    def run(self, out: str | os.PathLike[str], *, told: Told | None = None) -> Reft:
        """Trains the adapters, and writes them with a report.

        Args:
            out: folder. A stopped training goes on there, to the same bits; a complete one is left
                as it is.
            told: called with (stage, done, total, loss).

        Returns:
            The adapters, on the CPU.

        Raises:
            InvalidInput: the folder holds another training, is in use or cannot be written; or a
                part of the spec does not fit the subject.
            NonFiniteLoss: the loss is not finite any more.
        """
        from dreamreader.training.reft_page import write_report

        folder = TrainingFolder(Path(out))
        with folder.locked():
            batch = self._begun(folder)
            if not folder.is_complete:
                checkpoints = folder.path / _CHECKPOINTS
                with explained(folder.path):
                    found = fitted(
                        self.spec.training, self.place(batch), self.examples, checkpoints, told
                    )
                    _keep(folder, found)
            folder.check()
            if not (folder.path / "report.html").is_file():
                write_report(self.spec, folder)
            folder.clear(_CHECKPOINTS)
            folder.tidy()
        return Reft.load(folder.path / ADAPTER)

    def _begun(self, folder: TrainingFolder) -> int:
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

    def __repr__(self) -> str:
        spec = self.spec
        return f"ReftJob({spec.name!r}: {spec.training.variant} of {spec.subject.model})"


def _keep(folder: TrainingFolder, found: Fitted) -> None:
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
