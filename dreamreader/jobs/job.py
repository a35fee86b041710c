"""One protocol for every kind of job: spec, plan, run, folder, report, verify."""

import os
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel

from dreamreader._progress import Progress, ProgressCallback, ProgressEvent, show_progress
from dreamreader.errors import InvalidInput
from dreamreader.jobs.differences import JobDifference, differences
from dreamreader.jobs.folder import JobFolder
from dreamreader.specs.load import check_spec, load_spec, spec_of

if TYPE_CHECKING:
    from dreamreader.engine import Reader

RUNS = Path("runs")
REPORT = "report.html"

S = TypeVar("S", bound=BaseModel)
RunUnit = Callable[[int, int | None], int | None]
"""From the number of a unit, and the bytes that it may have, to those that it has; None: more."""


@dataclass(eq=False)
class Work:
    """What a folder lacks, for an engine to compute.

    Attributes:
        job, folder, plan: of which it is. missing: numbers of units.
        report: hears how far it is. done, total: in the job's own count, such as rows.
        numbers: sums over what was computed now. limit, stored: bytes of the result.
        stopped: whether the limit ended it. lost: workers that ended before their work did.
    """

    job: "SpecJob[Any]"
    folder: Any
    plan: Any
    missing: list[int]
    report: ProgressCallback
    done: float = 0
    total: float = 0
    numbers: Counter[str] = field(default_factory=Counter)
    limit: int | None = None
    stored: int = 0
    stopped: bool = False
    lost: int = 0

    def advance(self, count: float, **numbers: int) -> None:
        """Counts what was computed, and reports it."""
        self.done += count
        self.numbers.update(numbers)
        self.report(
            ProgressEvent(
                self.job.counts,
                self.done,
                self.total,
                {**self.numbers, "stored": self.stored, "lost": self.lost},
                self.job.note(self),
            )
        )


Engine = Callable[[Work], None]
"""Computes units until none is missing or the limit is reached."""


class SpecJob(Generic[S]):
    """A spec with the subject that it is about; the base of every kind of job.

    A kind says how its units are computed and where they go; a stopped job of any kind goes on
    after its last unit.

    Args:
        spec: whole, or its content as a mapping; or give the fields by name.
        reader: a subject of your own; `subject` then only names it.
        home: what relative names of files are meant from, where the spec does not say it.

    Raises:
        InvalidInput: a field cannot be right.
    """

    kind: ClassVar[str]
    model: ClassVar[type[BaseModel]]
    folder_type: ClassVar[type[JobFolder]]
    counts: ClassVar[str] = "units"  # what progress counts
    divides: ClassVar[bool] = False  # units can be computed by several processes
    spec: S

    def __init__(
        self,
        spec: S | Mapping[str, Any] | None = None,
        *,
        reader: "Reader | None" = None,
        home: Path | None = None,
        **fields: Any,
    ):
        self._reader, self._home = reader, home
        self.spec = spec_of(self.model, spec, fields, reader, type(self).__name__)  # pyright: ignore

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Self:
        """Reads a spec file; see `specs.load.load_spec`."""
        return cls(load_spec(cls.model, path, overrides), home=Path(path).parent)  # pyright: ignore

    @classmethod
    def of_folder(cls, path: str | os.PathLike[str]) -> Self:
        """The job that a folder was begun for.

        Raises:
            InvalidInput: there is none, or its spec was changed.
        """
        folder = cls.folder_type(Path(path))
        return cls(check_spec(cls.model, folder.spec(), source=str(folder.path)))  # pyright: ignore

    @property
    def folder(self) -> Path:
        """Where the result goes by default: `runs/<name>`."""
        words = re.sub(r"[^a-z0-9]+", "-", self.spec.name.lower()).strip("-")  # pyright: ignore
        return RUNS / (words or "run")

    @property
    def follows(self) -> bool:
        """Whether it ran as one of several processes, of which another says what was done."""
        return False

    @abstractmethod
    def plan(self) -> Any:
        """What will be done and what it will take, to be printed; little is run."""

    def run(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        progress: Progress = True,
        engine: Engine | None = None,
    ) -> Any:
        """Computes what the folder lacks, and writes the report.

        Args:
            out: the folder, `runs/<name>` by default. A stopped job goes on there; a complete one
                is left as it is.
            progress: shown by default, or a function of a `ProgressEvent`, or False.
            engine: what computes the units, such as a `RayEngine`; this process by default.

        Raises:
            InvalidInput: the folder holds another job, is in use, damaged or cannot be written.
        """
        return self._run(out, progress, engine)

    def _run(
        self,
        out: str | os.PathLike[str] | None,
        progress: Progress,
        engine: Engine | None = None,
        limit: int | None = None,
    ) -> Any:
        if engine is not None:
            self.check_divides()
        self.open()
        folder = self.folder_type(Path(out) if out is not None else self.folder)
        with show_progress(progress) as report, folder.lock():
            folder.check_kind(self.kind)
            plan = self.begin(folder)
            folder.tidy()
            there = self.units_there(folder, plan)
            work = Work(self, folder, plan, [], report, limit=limit)
            work.missing = [unit for unit in range(self.units(plan)) if unit not in there]
            work.total = sum(self.size(plan, unit) for unit in range(self.units(plan)))
            work.done = work.total - sum(self.size(plan, unit) for unit in work.missing)
            self.check_there(work, there)
            self._open(work)
            if work.missing or not folder.is_complete:
                if work.missing:
                    self.prepare(work)
                try:
                    (engine or run_here)(work)
                except BaseException:
                    self.after_interrupt(work)
                    raise
                self.finish(work)
            if not work.stopped:
                folder.check()
                self.clear(work)
                if not (folder.path / REPORT).is_file():
                    self.write_report(folder)
            folder.tidy()
        return self.result(folder)

    def check_divides(self) -> None:
        """Refuses other processes for what they cannot do.

        Raises:
            InvalidInput: the units depend on each other, or on an object of this process.
        """
        name = type(self).__name__
        if not self.divides:
            raise InvalidInput(f"{name}: an engine is for jobs whose units are independent")
        if self._reader is not None:
            raise InvalidInput(
                f"{name}: an engine opens the subject in other processes, by its name; a reader of "
                "your own cannot go there"
            )

    def _open(self, work: Work) -> None:
        text = self.opening(work)
        if text:
            event = ProgressEvent(self.counts, work.done, work.total, {}, self.note(work), text)
            work.report(event)

    # what a kind says

    def open(self) -> None:
        """Opens the subject and reads the data, before there is a folder."""

    @abstractmethod
    def begin(self, folder: Any) -> Any:
        """The plan of a folder, that of an earlier run or a new one; refuses another job's."""

    @abstractmethod
    def units(self, plan: Any) -> int:
        """How many units a plan has."""

    def size(self, plan: Any, unit: int) -> int:
        """Of a unit, in what progress counts."""
        return 1

    @abstractmethod
    def units_there(self, folder: Any, plan: Any) -> set[int]:
        """Numbers of the units that are there."""

    def check_there(self, work: Work, there: set[int]) -> None:
        """Refuses damaged units before anything is computed, and counts their bytes."""

    def needs(self, plan: Any, unit: int) -> set[int]:
        """Units that have to be there before this one is computed."""
        return set()

    def expected_bytes(self, work: Work, unit: int) -> float:
        """Bytes that a unit will have."""
        return 0.0

    def opening(self, work: Work) -> str:
        """A line that says what is there and what will be done."""
        return ""

    def note(self, work: Work) -> str:
        """Numbers of the moment in words."""
        return ""

    def prepare(self, work: Work) -> None:
        """Makes what all units need; in every process that computes some."""

    @abstractmethod
    def open_runner(self, work: Work) -> AbstractContextManager[RunUnit]:
        """Gives what computes a unit and puts it into the folder."""

    def after_interrupt(self, work: Work) -> None:
        """Leaves the folder as good as can be."""

    def after_unit(self, work: Work) -> None:
        """A unit more is there."""

    @abstractmethod
    def finish(self, work: Work) -> None:
        """Makes the result of the units."""

    def clear(self, work: Work) -> None:
        """Takes away what a complete job does not need."""

    @abstractmethod
    def result(self, folder: Any) -> Any:
        """What `run` gives."""

    # of a folder

    @classmethod
    @abstractmethod
    def write_report(cls, folder: Any) -> Path:
        """Writes `report.html` into a complete folder."""

    @classmethod
    @abstractmethod
    def summary(cls, folder: Any) -> list[str]:
        """What a folder has, in lines for the terminal."""

    @classmethod
    def results(cls, folder: Any) -> Mapping[str, Any]:
        """What was found, as plain values that two folders are compared by."""
        return {}

    @classmethod
    def diff(cls, first: str | Path, second: str | Path) -> JobDifference:
        """Compares two complete folders.

        Raises:
            InvalidInput: one is not complete, or is damaged.
        """
        one, other = cls.folder_type(Path(first)), cls.folder_type(Path(second))
        found = [cls.results(each) for each in (one, other)]
        return JobDifference(**one.differs(other), results=list(differences(found[0], found[1])))

    @classmethod
    def verify(
        cls, path: str | Path, rows: int = 8, seed: int = 0, progress: Progress = True
    ) -> "JobVerdict":
        """Compares every file of a complete folder with its checksum.

        Raises:
            InvalidInput: it is not complete.
        """
        folder = cls.folder_type(Path(path))
        folder.need_complete()
        try:
            folder.check()
        except InvalidInput as error:
            return JobVerdict(False, [str(error)])
        return JobVerdict(True, ["every file is as it was written"])


@dataclass(frozen=True)
class JobVerdict:
    """Whether a folder is what it was, in lines for the terminal."""

    holds: bool
    lines: list[str]


def run_here(work: Work) -> None:
    """Computes the missing units in this process, one after the other."""
    with work.job.open_runner(work) as run_unit:
        for unit in list(work.missing):
            room = None if work.limit is None else work.limit - work.stored
            before = work.done, work.numbers.copy()
            found = None
            if room is None or work.job.expected_bytes(work, unit) <= room:
                found = run_unit(unit, room)
            if found is None:
                (work.done, work.numbers), work.stopped = before, True
                return
            work.stored += found
            work.job.after_unit(work)
