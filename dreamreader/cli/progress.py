"""Progress bars and tables, the same everywhere."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def console(stderr: bool = False) -> Console:
    """A console that prints what models or people wrote as it is, without markup."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def progress() -> Progress:
    """A progress display on stderr; only its last state where there is no terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        console=console(stderr=True),
    )
