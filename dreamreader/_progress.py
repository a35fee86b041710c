"""Progress of long work: one type of callback, and the displays that are such callbacks.

`progress=` means the same in every function that takes it: True shows it (rich in a terminal, tqdm
in a notebook, nothing where nobody looks), False is silent, a function is called with each event.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dreamreader.errors import InvalidInput

T = TypeVar("T")


@dataclass(frozen=True)
class ProgressEvent:
    """How far a stage of some work is.

    Attributes:
        stage: what is done, in the unit that is counted: `rows`, `recording`, `training`.
        done, total: of the stage; the total is None where nobody knows it.
        numbers: of this moment, by name, such as {"loss": 0.12}.
        note: the numbers in words, for beside the bar. text: a line that is shown once.
    """

    stage: str
    done: float = 0
    total: float | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    text: str = ""


ProgressCallback = Callable[[ProgressEvent], Any]
Progress = bool | ProgressCallback
"""What a function takes as `progress`."""

# whether a function under way has settled what is shown: those inside show nothing more
_settled: ContextVar[bool] = ContextVar("settled", default=False)


def silent(event: ProgressEvent) -> None:
    """Shows nothing."""


@contextmanager
def show_progress(progress: Progress) -> Iterator[ProgressCallback]:
    """Gives the callback that `progress` means; `silent` itself where nothing is shown.

    Within the block `progress=True` of further functions shows nothing: there is one display.

    Raises:
        InvalidInput: it is neither a truth value nor a function.

    Example:
        >>> with show_progress(False) as report:
        ...     report(ProgressEvent("rows", 3, 10))
    """
    if not isinstance(progress, bool) and not callable(progress):
        raise InvalidInput(
            f"progress={progress!r}: give True, False, or a function that takes a ProgressEvent"
        )
    shown = _display() if progress is True and not _settled.get() else None
    token = _settled.set(True)
    try:
        if shown is not None:
            with shown as report:
                yield report
        else:
            yield silent if isinstance(progress, bool) else progress
    finally:
        _settled.reset(token)


def track(items: Sequence[T], stage: str, report: ProgressCallback) -> Iterator[T]:
    """Gives the items one by one, and reports how many are done."""
    for done, item in enumerate(items):
        report(ProgressEvent(stage, done, len(items)))
        yield item
    report(ProgressEvent(stage, len(items), len(items)))


def part_of(
    report: ProgressCallback, done: float, total: float, stage: str = "rows"
) -> ProgressCallback:
    """Reports the progress of a part as that of the whole, of which `done` came before it."""
    return lambda event: report(
        ProgressEvent(stage, done + event.done, total, event.numbers, event.note)
    )


@contextmanager
def pipeline_steps(pipe: Any, report: Callable[[int, int | None], Any]) -> Iterator[None]:
    """Within the block, a diffusers pipeline's bars call a function with (step, steps).

    Nothing else shows them. Afterwards they are as they were set.
    """
    from tqdm import tqdm

    class StepBar(tqdm):
        def __iter__(self) -> Iterator[Any]:
            for item in self.iterable:
                yield item
                self.update()

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            report(int(self.n), self.total)  # pyright: ignore[reportArgumentType]

    def bar(iterable: Any = None, total: Any = None, **_: Any) -> tqdm:
        return StepBar(iterable, total=total, disable=True)

    # a pipeline of several shows the bars of its parts
    parts = [pipe, *vars(pipe).values()] if hasattr(pipe, "__dict__") else []
    own = [vars(each) for each in parts if hasattr(type(each), "progress_bar")]
    before = [each.get("progress_bar") for each in own]
    for each in own:
        each["progress_bar"] = bar
    try:
        yield
    finally:
        for each, had in zip(own, before, strict=True):
            if had is None:
                del each["progress_bar"]
            else:
                each["progress_bar"] = had


@contextmanager
def terminal_display(console: Any = None) -> Iterator[ProgressCallback]:
    """Shows progress with rich: a bar for each stage, on stderr or the console given."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    shown = Progress(
        TextColumn("{task.description:<14}", markup=False),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        console=console or Console(stderr=True, highlight=False, markup=False, emoji=False),
    )
    tasks: dict[str, Any] = {}

    def report(event: ProgressEvent) -> None:
        if event.text:
            shown.console.print(event.text)
        if event.stage not in tasks:
            # what is there already is no part of the speed
            tasks[event.stage] = shown.add_task(
                event.stage, total=event.total, completed=int(event.done), note=event.note
            )
        shown.update(tasks[event.stage], total=event.total, completed=event.done, note=event.note)  # pyright: ignore[reportArgumentType]  rich counts in floats too

    with shown:
        yield report


@contextmanager
def notebook_display() -> Iterator[ProgressCallback]:
    """Shows progress with tqdm, as a widget where the notebook has widgets."""
    from tqdm.auto import tqdm

    bars: dict[str, Any] = {}

    def report(event: ProgressEvent) -> None:
        if event.text:
            tqdm.write(event.text)
        if event.stage not in bars:
            bars[event.stage] = tqdm(desc=event.stage, total=event.total, initial=event.done)
        bar = bars[event.stage]
        bar.total = event.total
        bar.set_postfix_str(event.note, refresh=False)
        bar.update(event.done - bar.n)

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


def _display() -> Any:
    """The display for where we are; None where nobody would see it."""
    if _in_notebook():
        return notebook_display()
    return terminal_display() if sys.stderr is not None and sys.stderr.isatty() else None


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")
