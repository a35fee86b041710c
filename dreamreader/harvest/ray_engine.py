"""Harvests on several processes or machines with Ray.

Workers share nothing but the folder of the store: each is given a unit, and seals it there.
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
from dreamreader.harvest.ray_worker import Order, Refused, Sealed, Worker
from dreamreader.harvest.run import Work, expected, tidy
from dreamreader.store.index import sealed_units

_TRIES = 3  # workers lost with the same unit, or one after the other at their start, that end it
_MEMORY = 200 << 20
_PATIENCE = 20.0  # seconds for a connection
_OPENING = -1  # what a worker does that has no unit yet


@dataclass(frozen=True)
class RayEngine:
    """Harvests units in the workers of a Ray cluster, each in a process of its own.

    A worker opens the subject by itself, on `cores / workers` cores, and on a GPU of its own where
    the subject is on CUDA. The unit of a worker that is lost goes to another one, and a new worker
    is started. An error of the harvest itself ends it, as it does without Ray.

    Args:
        workers: how many; one for each GPU or, on the CPU, for each machine by default.
        address: host:port of the head of a running cluster that this machine is in, RAY_ADDRESS by
            default. Without both a cluster is started on this machine, and ends with the harvest.

    Raises:
        InvalidInput: Ray is not installed, or `workers` is not positive.

    Example:
        >>> Harvest.from_file("spec.yaml").run("store", engine=RayEngine(4))  # doctest: +SKIP
    """

    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InvalidInput(f"workers={self.workers}: must be positive")
        _ray()

    def __call__(self, work: Work) -> None:
        """Harvests the missing units.

        Raises:
            InvalidInput: an error of the harvest; the cluster is too small or cannot be reached; or
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
            crew = _Crew(work, min(workers, len(work.missing)), threads, cuda)
            try:
                crew.run()
            finally:
                crew.dismiss()
        tidy(work.store)


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


class _Room:
    """Shares the bytes that the store may still have among the units under way.

    While there is plenty, every worker has an even share. Then units are run one at a time, so that
    the store never has more than the limit, and misses no unit that fits.
    """

    def __init__(self, work: Work):
        self._work = work
        self._shares: dict[int, int] = {}
        self._alone = False

    def taken(self, unit: int, idle: int) -> bool:
        """Whether a unit may start now, with `idle` workers that could start one."""
        limit, progress = self._work.limit, self._work.progress
        if limit is None:
            return True
        if self._alone and self._shares:
            return False
        left = limit - progress.stored - sum(self._shares.values())
        share = left if self._alone else left // idle
        if share < expected(self._work.plan, unit, progress):
            if self._alone:
                progress.stopped = True
                return False
            self._alone = True
            return self.taken(unit, idle)
        self._shares[unit] = share
        return True

    def of(self, unit: int) -> int | None:
        return self._shares.get(unit)

    def free(self, unit: int) -> None:
        self._shares.pop(unit, None)

    def exceeded(self, unit: int) -> None:
        """A unit had more than its share: it is run alone, or does not fit at all."""
        left = self._work.limit - self._work.progress.stored  # pyright: ignore
        self._work.progress.stopped = self._shares.pop(unit) == left
        self._alone = True


class _Crew:
    """The workers, and which of them does what."""

    def __init__(self, work: Work, workers: int, threads: int, cuda: bool):
        self._work = work
        self._left = sorted(work.missing)
        self._room = _Room(work)
        self._lost: Counter[int] = Counter()
        self._tasks: dict[Any, tuple[Any, int]] = {}  # by future: worker and unit
        self._idle: list[Any] = []
        self._most_at_start = _TRIES * workers
        order = Order(
            work.job.spec, work.plan, os.getcwd(), str(work.store.resolve()), work.run, threads
        )
        kind = _ray().remote(num_cpus=threads, num_gpus=int(cuda), max_restarts=0)(Worker)
        self._start = lambda: kind.remote(order)
        for _ in range(workers):
            self._hire()

    def run(self) -> None:
        while self._left or any(unit != _OPENING for _, unit in self._tasks.values()):
            self._assign()
            if self._work.progress.stopped:
                return
            self._next()
        unseen = set(self._work.missing).difference(sealed_units(self._work.store))
        if unseen:
            raise InvalidInput(
                f"{self._work.store}: unit {min(unseen)} was sealed by a worker, but is not there; "
                "the store must be in a folder that all machines share"
            )

    def dismiss(self) -> None:
        for worker in [*self._idle, *(worker for worker, _ in self._tasks.values())]:
            _ray().kill(worker)

    def _hire(self) -> None:
        # it gets a unit when it is there: where the cluster has no place, none must wait for it
        worker = self._start()
        self._tasks[worker.open.remote()] = worker, _OPENING

    def _assign(self) -> None:
        while self._idle and self._left and self._room.taken(self._left[0], len(self._idle)):
            unit, worker = self._left.pop(0), self._idle.pop()
            self._tasks[worker.harvest.remote(unit, self._room.of(unit))] = worker, unit

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
        if isinstance(found, Refused):
            raise found.error()
        if isinstance(found, Sealed):
            self._room.free(unit)
            self._count(unit, found)
        elif unit != _OPENING:
            self._room.exceeded(unit)
            insort(self._left, unit)

    def _count(self, unit: int, found: Sealed) -> None:
        start, stop = self._work.plan.range_of(unit)
        progress = self._work.progress
        progress.samples += stop - start
        progress.rows += found.rows
        progress.bytes += found.bytes
        progress.stored += found.bytes
        progress.units += 1
        self._work.advance(progress)
        self._work.refresh()

    def _replace(self, worker: Any, unit: int, error: Exception) -> None:
        """Starts another worker for one that was lost, and gives its unit back."""
        _ray().kill(worker)  # it may only be out of reach
        self._work.progress.lost += 1
        self._lost[unit] += 1
        if self._lost[unit] >= (self._most_at_start if unit == _OPENING else _TRIES):
            what = "starting" if unit == _OPENING else f"at unit {unit}"
            raise InvalidInput(
                f"{self._lost[unit]} workers in a row were lost {what}, "
                f"{self._work.progress.lost} in all; the last one: {' '.join(str(error).split())} "
                "What was finished is kept; the same command goes on there"
            )
        if unit != _OPENING:
            self._room.free(unit)
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
        _reached(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"no Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _reached(address: str) -> None:
    """Raises OSError where nobody listens: Ray would try for many minutes."""
    if "://" in address:
        raise ValueError("give host:port of its head, on a machine of the cluster")
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


def _machines() -> list[Machine]:
    nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
    return [Machine(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in nodes]
