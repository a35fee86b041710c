"""The console and its tables, the same everywhere."""

from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 2000  # columns where the output is no terminal, so that no line is broken


def console(stderr: bool = False) -> Console:
    """A console that prints what models or people wrote as it is, without markup."""
    found = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found.width = PIPE_WIDTH
    return found


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines; the columns named in `right` are set flush right."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        found.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return found
