"""A worker of a job with Ray: a process that opens the subject and computes units."""

import os
import platform
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel

from dreamreader._progress import silent
from dreamreader.errors import DreamreaderError, InvalidInput
from dreamreader.jobs.job import Work
from dreamreader.jobs.kinds import job_type


@dataclass(frozen=True)
class WorkerOrder:
    """What all workers of a job do.

    Attributes:
        kind, spec: of the job. home: that relative paths of the spec are in.
        folder: an absolute path. run: digest of the fingerprint. threads: of a worker.
    """

    kind: str
    spec: BaseModel
    home: str
    folder: str
    run: str
    threads: int


class ComputedUnit(NamedTuple):
    """A unit that is there now."""

    numbers: dict[str, int]
    bytes: int


class WorkerError(NamedTuple):
    """An error that the library raised on purpose, without its arguments: some do not pickle."""

    kind: type[DreamreaderError]
    text: str

    def error(self) -> DreamreaderError:
        # past __init__, which takes other arguments than the text
        return self.kind.__new__(self.kind, self.text)


class JobWorker:
    """Opens the job once, then computes one unit after the other."""

    def __init__(self, order: WorkerOrder):
        self.order = order
        self._stack = ExitStack()
        self._work: Work | None = None
        self._run_unit: Any = None

    def open(self) -> WorkerError | None:
        """Makes ready for the first unit."""
        try:
            self._open()
        except DreamreaderError as error:
            return WorkerError(type(error), f"worker on {platform.node()}: {error}")
        return None

    def compute(self, unit: int, room: int | None) -> ComputedUnit | WorkerError | None:
        """Computes a unit of up to `room` bytes; None where it would have more."""
        assert self._work is not None
        self._work.numbers.clear()
        try:
            found = self._run_unit(unit, room)
        except DreamreaderError as error:
            return WorkerError(type(error), str(error))
        return None if found is None else ComputedUnit(dict(self._work.numbers), found)

    def _open(self) -> None:
        order = self.order
        torch.set_num_threads(order.threads)
        if Path(order.home).is_dir():
            os.chdir(order.home)
        kind = job_type(order.kind)
        folder = kind.folder_type(Path(order.folder))
        if not folder.is_begun:
            raise InvalidInput(
                f"{folder.path} has no {folder.identity} here; it must be a folder that all "
                "machines share"
            )
        if folder.run != order.run:
            raise InvalidInput(
                f"{folder.path} is another one here, of run {folder.run[:12]}, not "
                f"{order.run[:12]}; it must be a folder that all machines share"
            )
        job = kind(order.spec)
        self._work = Work(job, folder, job.begin(folder), [], silent)
        job.prepare(self._work)
        self._run_unit = self._stack.enter_context(job.open_runner(self._work))
