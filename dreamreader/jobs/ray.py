"""Jobs on several processes or machines with Ray.

Workers share nothing but the folder of the job: each is given a unit, and writes it there.
"""

import os
import socket
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dreamreader.errors import InvalidInput
from dreamreader.jobs.job import Work
from dreamreader.jobs.ray_worker import ComputedUnit, JobWorker, WorkerError, WorkerOrder

_TRIES = 3  # workers lost with the same unit, or one after the other at their start, that end it
_MEMORY = 200 << 20
_PATIENCE = 20.0  # seconds for a connection
_OPENING = -1  # what a worker does that has no unit yet


@dataclass(frozen=True)
class RayEngine:
    """Computes units in the workers of a Ray cluster, each in a process of its own.

    A worker opens the subject by itself, on `cores / workers` cores, and on a GPU of its own where
    the subject is on CUDA. The unit of a worker that is lost goes to another one, and a new worker
    is started. An error of the job itself ends it, as it does without Ray.

    Args:
        workers: how many; one for each GPU or, on the CPU, for each machine by default.
        address: host:port of the head of a running cluster that this machine is in, RAY_ADDRESS by
            default. Without both a cluster is started on this machine, and ends with the job.

    Raises:
        InvalidInput: Ray is not installed, or `workers` is not positive.

    Example:
        >>> Harvest.from_file("spec.yaml").run("store", engine=engine)  # doctest: +SKIP
        >>> Experiment.from_file("steer.yaml").run("runs/steer", engine=engine)  # doctest: +SKIP
    """

    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InvalidInput(f"workers={self.workers}: must be positive")
        _ray()

    def __call__(self, work: Work) -> None:
        """Computes the missing units.

        Raises:
            InvalidInput: an error of the job; the cluster is too small or cannot be reached; or
                too many workers were lost.
        """
        if not work.missing:
            return
        device = work.job.spec.subject.device
        if device not in ("cpu", "cuda"):
            raise InvalidInput(f"subject.device={device}: workers with Ray take cpu or cuda")
        with _cluster(self.address):
            cuda = device == "cuda"
            machines = _machines()
            workers = self.workers or (sum(m.gpus for m in machines) if cuda else len(machines))
            threads = threads_of(machines, workers, cuda)
            pool = WorkerPool(work, min(workers, len(work.missing)), threads, cuda)
            try:
                pool.run()
            finally:
                pool.dismiss()
        work.folder.tidy()


@dataclass(frozen=True)
class Machine:
    """What a machine of the cluster has."""

    cores: int
    gpus: int


def threads_of(machines: Sequence[Machine], workers: int, cuda: bool) -> int:
    """Cores of each worker, the most with which all workers find a place.

    Raises:
        InvalidInput: they find none even with one core each.
    """
    for threads in range(max((m.cores for m in machines), default=0), 0, -1):
        places = (m.cores // threads for m in machines)
        if cuda:
            places = (min(n, m.gpus) for n, m in zip(places, machines, strict=True))
        if sum(places) >= workers > 0:
            return threads
    have = f"{sum(m.cores for m in machines)} cores"
    if cuda:
        have += f" and {sum(m.gpus for m in machines)} GPUs"
    raise InvalidInput(f"workers={workers}: the cluster has {have}; a worker needs one of each")


class ByteBudget:
    """Shares the bytes that the result may still have among the units under way.

    While there is plenty, every worker has an even share. Then units are run one at a time, so that
    the result never has more than the limit, and misses no unit that fits.
    """

    def __init__(self, work: Work):
        self._work = work
        self._shares: dict[int, int] = {}
        self._alone = False

    def take(self, unit: int, idle: int) -> bool:
        """Whether a unit may start now, with `idle` workers that could start one."""
        work, limit = self._work, self._work.limit
        if limit is None:
            return True
        if self._alone and self._shares:
            return False
        left = limit - work.stored - sum(self._shares.values())
        share = left if self._alone else left // idle
        if share < work.job.expected_bytes(work, unit):
            if self._alone:
                work.stopped = True
                return False
            self._alone = True
            return self.take(unit, idle)
        self._shares[unit] = share
        return True

    def of(self, unit: int) -> int | None:
        return self._shares.get(unit)

    def free(self, unit: int) -> None:
        self._shares.pop(unit, None)

    def retry_alone(self, unit: int) -> None:
        """A unit had more than its share: it is run alone, or does not fit at all."""
        left = self._work.limit - self._work.stored  # pyright: ignore
        self._work.stopped = self._shares.pop(unit) == left
        self._alone = True


class WorkerPool:
    """The workers, and which of them does what."""

    def __init__(self, work: Work, workers: int, threads: int, cuda: bool):
        self._work = work
        self._left = sorted(work.missing)
        self._budget = ByteBudget(work)
        self._there = set(range(work.job.units(work.plan))).difference(work.missing)
        self._lost: Counter[int] = Counter()
        self._tasks: dict[Any, tuple[Any, int]] = {}  # by future: worker and unit
        self._idle: list[Any] = []
        self._most_at_start = _TRIES * workers
        job, folder = work.job, work.folder
        order = WorkerOrder(
            job.kind, job.spec, os.getcwd(), str(folder.path.resolve()), folder.run, threads
        )
        kind = _ray().remote(num_cpus=threads, num_gpus=int(cuda), max_restarts=0)(JobWorker)
        self._start = lambda: kind.remote(order)
        for _ in range(workers):
            self._hire()

    def run(self) -> None:
        while self._left or any(unit != _OPENING for _, unit in self._tasks.values()):
            self._assign()
            if self._work.stopped:
                return
            self._next()
        work = self._work
        unseen = set(work.missing).difference(work.job.units_there(work.folder, work.plan))
        if unseen:
            raise InvalidInput(
                f"{work.folder.path}: unit {min(unseen)} was written by a worker, but is not "
                "there; it must be a folder that all machines share"
            )

    def dismiss(self) -> None:
        for worker in [*self._idle, *(worker for worker, _ in self._tasks.values())]:
            _ray().kill(worker)

    def _hire(self) -> None:
        # it gets a unit when it is there: where the cluster has no place, none must wait for it
        worker = self._start()
        self._tasks[worker.open.remote()] = worker, _OPENING

    def _assign(self) -> None:
        needs, plan = self._work.job.needs, self._work.plan
        while self._idle:
            ready = (unit for unit in self._left if needs(plan, unit) <= self._there)
            unit = next(ready, None)
            if unit is None or not self._budget.take(unit, len(self._idle)):
                return
            self._left.remove(unit)
            worker = self._idle.pop()
            self._tasks[worker.compute.remote(unit, self._budget.of(unit))] = worker, unit

    def _next(self) -> None:
        """Waits for what ends next."""
        ray = _ray()
        (future,), _ = ray.wait(list(self._tasks), num_returns=1)
        worker, unit = self._tasks.pop(future)
        try:
            found = ray.get(future)
        except ray.exceptions.RayTaskError:
            self._idle.append(worker)
            raise
        except ray.exceptions.RayError as error:
            self._replace(worker, unit, error)
            return
        self._idle.append(worker)
        self._lost.pop(unit, None)
        if isinstance(found, WorkerError):
            raise found.error()
        if isinstance(found, ComputedUnit):
            self._budget.free(unit)
            self._count(unit, found)
        elif unit != _OPENING:
            self._budget.retry_alone(unit)
            insort(self._left, unit)

    def _count(self, unit: int, found: ComputedUnit) -> None:
        work = self._work
        self._there.add(unit)
        work.stored += found.bytes
        work.advance(work.job.size(work.plan, unit), **found.numbers)
        work.job.after_unit(work)

    def _replace(self, worker: Any, unit: int, error: Exception) -> None:
        """Starts another worker for one that was lost, and gives its unit back."""
        _ray().kill(worker)  # it may only be out of reach
        self._work.lost += 1
        self._lost[unit] += 1
        if self._lost[unit] >= (self._most_at_start if unit == _OPENING else _TRIES):
            what = "starting" if unit == _OPENING else f"at unit {unit}"
            raise InvalidInput(
                f"{self._lost[unit]} workers in a row were lost {what}, "
                f"{self._work.lost} in all; the last one: {' '.join(str(error).split())} "
                "What was finished is kept; the same command goes on there"
            )
        if unit != _OPENING:
            self._budget.free(unit)
            insort(self._left, unit)
        self._hire()


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise InvalidInput("the engine ray needs the package ray: pip install ray") from error
    return ray


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connects to a cluster; one that is started here ends with the block."""
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {}
    if address == "local":  # only specs and numbers go through its memory
        own = {"include_dashboard": False, "object_store_memory": _MEMORY}
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"no Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises OSError where nobody listens: Ray would try for many minutes."""
    if "://" in address:
        raise ValueError("give host:port of its head, on a machine of the cluster")
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


def _machines() -> list[Machine]:
    nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
    return [Machine(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in nodes]
