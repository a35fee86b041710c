"""`dreamreader store`: what a store of activations has, whether it is sound, and other formats."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreamreader.cli.errors import report_errors
from dreamreader.cli.jobs import verify_folder
from dreamreader.errors import InvalidInput

if TYPE_CHECKING:
    from rich.table import Table

    from dreamreader.store.manifest import Count
    from dreamreader.store.stats import SiteStatistics
    from dreamreader.store.store import Store

_SHOWN = 20  # of the places of damage

app = typer.Typer(
    help="Stores of activations: look at, check, merge, export, take statistics of.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
Sites = Annotated[list[str] | None, typer.Option("--site", help="One site; repeat it for several.")]
Branches = Annotated[list[str] | None, typer.Option("--branch", help="Repeat it for several.")]
Steps = Annotated[
    str | None,
    typer.Option(help="7, 0,5,9 or start:stop:step; negative ones count from the last."),
]


@app.command()
@report_errors
def info(folder: Folder) -> None:
    """Print what a store has: sites, rows, steps, branches, what is missing, and where it is from.

    \b
    Example:
      dreamreader store info activations
    """
    from dreamreader.cli.console import console, table
    from dreamreader.store.store import Store

    store = Store(folder)
    columns = ("site", "width", "dtype", "rows", "GB", "tokens")
    listed = table(*columns, right=columns[1:2] + columns[3:5])
    for name, site in store.sites.items():
        rows, grid = store.rows_of(name), "" if site.hw is None else "{} x {}".format(*site.hw)
        tokens = " ".join(
            filter(None, (grid, "" if site.pool == "none" else f"{site.pool} of all"))
        )
        kind = str(site.stored).removeprefix("torch.")
        size = f"{rows * site.row_bytes / 1e9:,.3f}"
        listed.add_row(name, f"{site.width:,}", kind, f"{rows:,}", size, tokens)
    console().print(listed)
    for line in _lines(store):
        console().print(line)


@app.command()
@report_errors
def verify(folder: Folder) -> None:
    """Read every byte of a store and compare it with its checksum. Exit 1 if anything is wrong.

    \b
    Example:
      dreamreader store verify activations
    """
    from dreamreader.harvest.harvest import Harvest

    verify_folder(Harvest, folder)


@app.command()
@report_errors
def merge(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Folders of stores.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder.")],
    copy: Annotated[bool, typer.Option("--copy", help="Copy files instead of linking.")] = False,
) -> None:
    """Make one store of several; files are linked where the file system can, so it takes no room.

    \b
    Example:
      dreamreader store merge colours shapes --out both
    """
    from dreamreader._progress import terminal_display
    from dreamreader.cli.console import console
    from dreamreader.store.merge import merge as run

    with terminal_display(console(stderr=True)) as display:
        store = run(stores, out, not copy, display)
    console().print(f"{out}: {len(store.units):,} units, {store.rows:,} rows")


@app.command()
@report_errors
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder.")],
    format: Annotated[str, typer.Option("--format", "-f", help="npy, huggingface or webdataset.")],
    site: Sites = None,
    steps: Steps = None,
    branch: Branches = None,
) -> None:
    """Write rows in a format that other tools read; bfloat16, fp8 and int8 become float32.

    \b
    Examples:
      dreamreader store export activations -o rows -f npy --site unet.mid_block --steps 0:10
      dreamreader store export activations -o rows -f huggingface --branch cond
    """
    from dreamreader._progress import terminal_display
    from dreamreader.cli.console import console
    from dreamreader.store.export import export as run
    from dreamreader.store.store import Store

    chosen, store = steps_of(steps), Store(folder)
    total = sum(store.segments(each, chosen, branch).total for each in site or store.sites)
    with terminal_display(console(stderr=True)) as display:
        run(folder, out, format, site, chosen, branch, display)
    console().print(f"{out}: {total:,} rows")


@app.command()
@report_errors
def stats(
    folder: Folder,
    site: Sites = None,
    steps: Steps = None,
    branch: Branches = None,
    covariance: Annotated[bool, typer.Option("--covariance", help="Of the features too.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for vectors, as JSON and npy.")
    ] = None,
) -> None:
    """Print norms and variances by step and branch; write means and covariances of the features.

    \b
    Examples:
      dreamreader store stats activations --site unet.mid_block
      dreamreader store stats activations --branch cond --covariance --out statistics
    """
    from dreamreader._progress import terminal_display
    from dreamreader.cli.console import console
    from dreamreader.store.layout import file_of
    from dreamreader.store.stats import stats as run
    from dreamreader.store.store import Store

    if covariance and out is None:
        raise InvalidInput("--covariance is too large to print: name a folder with --out")
    store, chosen = Store(folder), steps_of(steps)
    for name in site or store.sites:
        with terminal_display(console(stderr=True)) as display:
            found = run(store, name, chosen, branch, covariance, display)
        lost = f"; {found.not_finite:,} rows are not finite" if found.not_finite else ""
        norm = found.whole.mean_norm
        scale = f"scale to norm sqrt(width) {found.normalisation()[1]:.6g}" if norm else "all 0"
        console().print(f"{name}: {scale}{lost}")
        console().print(_table(found))
        if out is not None:
            found.write(out / f"{file_of(name).removesuffix('.safetensors')}.json")


def steps_of(text: str | None) -> Any:
    """What `--steps` says, as `Record` takes it.

    Raises:
        InvalidInput: it is neither a number, nor a list, nor a slice.
    """
    if text is None:
        return None
    try:
        if ":" in text:
            start, stop, step = [int(x) if x else None for x in (text + "::").split(":")[:3]]
            return slice(start, stop, step)
        return [int(x) for x in text.split(",")]
    except ValueError:
        raise InvalidInput(f"--steps {text}: expected 7, 0,5,9 or start:stop:step") from None


def _lines(store: "Store") -> Iterator[str]:
    """What `info` says of the store as a whole."""
    manifest, sealed = store.manifest, len(store.units)
    yield f"rows        {store.rows:,}, {store.nbytes / 1e9:,.3f} GB with keys and checksums"
    yield f"steps       {_numbers(store.steps)}"
    yield f"branches    {', '.join(store.branches)}"
    planned = sum(job.units[1] - job.units[0] for job in manifest.jobs)
    of = f" of {planned:,}" if planned else ""
    state = "complete" if manifest.complete else "not complete"
    yield f"units       {sealed:,}{of} sealed, {state}"
    for name, counts in (("left out", manifest.left_out), ("not finite", manifest.not_finite)):
        yield f"{name:<12}{_counts(counts)}"
    for job in manifest.jobs:
        first, stop = job.units
        yield f"run         {job.run}, units {first} to {stop - 1}"
    if not manifest.complete and len(manifest.jobs) > 1:
        yield "to go on    finish each harvest in its own folder, and merge them again"
    elif not manifest.complete:
        yield f"to go on    run the same harvest again with --out {store.path}"


def _table(found: "SiteStatistics") -> "Table":
    from dreamreader.cli.console import table

    columns = ("step", "branch", "rows", "mean norm", "5 %", "median", "95 %", "variance")
    listed = table(*columns, right=columns[:1] + columns[2:])
    for each in (*found.groups, found.whole):
        place = ("all", "") if each.step is None else (str(each.step), each.branch)
        norms = (each.mean_norm, *(each.norm_quantiles[q] for q in (0.05, 0.5, 0.95)))
        numbers = (f"{x:.5g}" for x in (*norms, float(each.variance.sum())))
        listed.add_row(*place, f"{each.rows:,}", *numbers)
    return listed


def _counts(counts: "tuple[Count, ...]") -> str:
    if not counts:
        return "none"
    total = f"{sum(each.rows for each in counts):,} rows: "
    shown = [f"{each.rows:,} of {each.site} at step {each.step}" for each in counts[:_SHOWN]]
    return total + ", ".join(shown) + (", ..." if len(counts) > _SHOWN else "")


def _numbers(numbers: list[int]) -> str:
    """Numbers with their runs drawn together."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs)
