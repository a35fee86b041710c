"""A worker of a harvest with Ray: a process that opens the subject and harvests units."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dreamreader.errors import DreamreaderError, InvalidInput
from dreamreader.harvest.capture import Collector
from dreamreader.harvest.job import HarvestJob, open_job
from dreamreader.harvest.plan import Plan
from dreamreader.harvest.run import fingerprint_of, harvest_unit, writer_for
from dreamreader.harvest.spec import Spec
from dreamreader.jobs.differences import first_difference
from dreamreader.store.manifest import Manifest


@dataclass(frozen=True)
class Order:
    """What all workers of a harvest do.

    Attributes:
        spec: of the harvest. plan: of its units. folder: that relative paths of the spec are in.
        store: an absolute path. run: digest of the fingerprint. threads: of a worker.
    """

    spec: Spec
    plan: Plan
    folder: str
    store: str
    run: str
    threads: int


class Sealed(NamedTuple):
    """A unit that is there now."""

    rows: int
    bytes: int


class Refused(NamedTuple):
    """An error that the library raised on purpose, without its arguments: some do not pickle."""

    kind: type[DreamreaderError]
    text: str

    def error(self) -> DreamreaderError:
        # past __init__, which takes other arguments than the text
        return self.kind.__new__(self.kind, self.text)


class Worker:
    """Opens the subject and the prompts once, then harvests one unit after the other."""

    def __init__(self, order: Order):
        self.order = order
        self._job: HarvestJob | None = None
        self._writer: Any = None

    def open(self) -> Refused | None:
        """Makes ready for the first unit."""
        try:
            self._open()
        except DreamreaderError as error:
            return Refused(type(error), f"worker on {platform.node()}: {error}")
        return None

    def harvest(self, unit: int, room: int | None) -> Sealed | Refused | None:
        """Harvests a unit of up to `room` bytes; None where it would have more."""
        assert self._job is not None
        rows = 0

        def ran(samples: int, collector: Collector) -> None:
            nonlocal rows
            rows = collector.rows

        try:
            found = harvest_unit(self._job, self.order.plan, unit, self._writer, room, ran)
        except DreamreaderError as error:
            return Refused(type(error), str(error))
        return None if found is None else Sealed(rows, found)

    def _open(self) -> None:
        order, store = self.order, Path(self.order.store)
        torch.set_num_threads(order.threads)
        if Path(order.folder).is_dir():
            os.chdir(order.folder)
        if not Manifest.there(store):
            raise InvalidInput(
                f"{store} has no manifest.json here; the store must be in a folder that all "
                "machines share"
            )
        found = Manifest.read(store).jobs[0]
        if found.run != order.run:
            raise InvalidInput(
                f"{store} is another store here, of run {found.run[:12]}, not {order.run[:12]}; "
                "it must be in a folder that all machines share"
            )
        job = open_job(order.spec)
        taken = fingerprint_of(job, order.plan)
        if taken.digest != order.run:
            difference = first_difference(found.fingerprint, taken.as_dict())
            raise InvalidInput(
                f"it would harvest other rows than the command that started it: {difference}"
            )
        self._job, self._writer = job, writer_for(job, store, order.run)
