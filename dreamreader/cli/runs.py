"""`dreamreader report`, `diff` and `verify`: run folders that exist."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dreamreader.cli.errors import told
from dreamreader.errors import InvalidInput

DIFFERS = 1

Folder = Annotated[Path, typer.Argument(help="Run folder.")]


@told
def report(folder: Folder) -> None:
    """Write the report of a complete run anew.

    \b
    Example:
      dreamreader report runs/where-colour-enters
    """
    from dreamreader.cli.progress import console
    from dreamreader.experiments import load_results
    from dreamreader.experiments.page import summary, write_report

    results = load_results(folder)
    write_report(results)
    for line in summary(results):
        console().print(line)


@told
def diff(
    first: Folder, second: Annotated[Path, typer.Argument(help="Another run folder.")]
) -> None:
    """Print what differs between two runs: spec, weights, versions, metrics. Exit 1 if anything.

    \b
    Example:
      dreamreader diff runs/steer runs/steer-more-steps
    """
    from dreamreader.cli.progress import console, table
    from dreamreader.experiments import diff as compare

    found = compare(first, second)
    parts = (
        ("spec", found.spec),
        ("fingerprint", found.fingerprint),
        ("machine", found.machine),
        ("metrics", found.metrics),
    )
    for title, differences in parts:
        if differences:
            listed = table(title, str(first), str(second))
            for name, old, new in differences:
                listed.add_row(name, _shown(old), _shown(new))
            console().print(listed)
    shared = min(found.rows)
    console().print(
        f"rows: {found.rows[0]:,} and {found.rows[1]:,}; {found.same_rows:,} of {shared:,} give "
        "the same output to the bit"
    )
    same = found.same_rows == found.rows[0] == found.rows[1]
    if found.spec or found.fingerprint or found.metrics or not same:
        raise typer.Exit(DIFFERS)


@told
def verify(
    folder: Folder,
    rows: Annotated[int, typer.Option("--rows", "-n", help="Rows to repeat.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of the random sample.", min=0)] = 0,
) -> None:
    """Repeat a random sample of rows and compare every value to the bit. Exit 1 if any differs.

    \b
    Example:
      dreamreader verify runs/where-colour-enters --rows 20
    """
    from dreamreader.cli.progress import console, progress, table
    from dreamreader.experiments import load_results
    from dreamreader.experiments import verify as repeat
    from dreamreader.experiments.folder import RunFolder
    from dreamreader.experiments.job import open_job

    if not folder.is_dir():
        raise InvalidInput(f"{folder}: no such run folder")
    results = load_results(folder)
    with progress() as bar:
        verdict = repeat(
            open_job(results.spec),
            RunFolder(folder),
            rows,
            seed,
            lambda units: bar.track(units, description="batches"),
        )
    if verdict.holds:
        console().print(f"{len(verdict.checked)} rows repeated, all equal to the bit")
        return
    listed = table("row", "column", "in the folder", "now")
    for row, name, old, new in verdict.different:
        listed.add_row(str(row), name, _shown(old), _shown(new))
    console().print(listed)
    wrong = len({row for row, *_ in verdict.different})
    console().print(f"{wrong} of {len(verdict.checked)} repeated rows differ")
    raise typer.Exit(DIFFERS)


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def register(app: typer.Typer) -> None:
    for command in (report, diff, verify):
        app.command()(command)
