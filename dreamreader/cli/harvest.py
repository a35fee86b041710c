"""`dreamreader harvest`: activations of many prompts to a store on disk."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from dreamreader.cli.errors import check_folder, told
from dreamreader.cli.run import Overrides, Spec
from dreamreader.cli.subject import SpecDevice, SpecDtype, with_subject
from dreamreader.errors import InvalidInput


@told
def harvest(
    spec: Spec,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the store.")] = None,
    limit_gb: Annotated[
        float | None,
        typer.Option(help="Stop before the store has more GB (10^9 bytes) than this.", min=0),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print sites, rows, GB, units and time; a few samples are run.")
    ] = False,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="This process, or workers of a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(help="Of Ray; one for each GPU, or machine, by default.", min=1),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of a running Ray cluster; RAY_ADDRESS, or one started here."),
    ] = None,
    device: SpecDevice = None,
    dtype: SpecDtype = None,
) -> None:
    """Record chosen sites over many prompts; a stopped harvest goes on where it was.

    \b
    Examples:
      dreamreader harvest examples/harvest/attention.yaml --dry-run
      dreamreader harvest examples/harvest/attention.yaml -o activations --limit-gb 20
      dreamreader harvest examples/harvest/language.yaml data.limit=1000 -o activations
      dreamreader harvest examples/harvest/attention.yaml -o activations --engine ray --workers 2
    """
    from rich.progress import TextColumn

    from dreamreader.cli.progress import console, progress
    from dreamreader.harvest import Harvest

    chosen = engine_of(engine, workers, address)
    job = Harvest.from_file(spec, with_subject(overrides, device, dtype))
    if dry_run:
        console().print(job.spec.name)
        console().print(repr(job.plan()))
        return
    if out is None:
        raise InvalidInput("give --out, the folder of the store; or --dry-run")
    check_folder(out)
    with progress(TextColumn("{task.fields[speed]}", markup=False)) as bar:
        task = bar.add_task("opening", total=None, speed="")
        seen, began = [], time.perf_counter()

        def started(plan, found) -> None:
            nonlocal task, began
            seen.append((plan, found))
            began = time.perf_counter()  # opening the subject is no part of the speed
            bar.remove_task(task)  # nor is what is there already
            task = bar.add_task("samples", total=found.total, completed=found.there, speed="")
            note = f" ({found.there:,} are there)" if found.there else ""
            console(stderr=True).print(
                f"{found.total:,} samples{note} in {plan.units:,} units of {plan.unit:,}"
            )

        def advance(found) -> None:
            shown = speed(found, time.perf_counter() - began)
            bar.update(task, completed=found.samples, speed=shown)

        try:
            store = job.run(out, limit_gb=limit_gb, started=started, advance=advance, engine=chosen)
        except KeyboardInterrupt:
            if seen:
                console(stderr=True).print("the same command goes on after the last sealed unit")
            raise
    for line in summary(job.spec.name, store, *seen[0]):
        console().print(line)


def engine_of(name: str, workers: int | None, address: str | None):
    """The engine that the options choose; None for this process."""
    if name == "ray":
        from dreamreader.harvest import RayEngine

        return RayEngine(workers, address)
    if workers is not None or address is not None:
        raise InvalidInput("--workers and --address are of --engine ray")
    return None


def speed(found, seconds: float) -> str:
    """Rows and GB per second of this run, and GB on disk."""
    rate = max(seconds, 1e-9)
    return (
        f"{found.rows / rate:,.0f} rows/s, {found.bytes / rate / 1e9:.3f} GB/s, "
        f"{found.stored / 1e9:.2f} GB"
    )


def summary(name: str, store, plan, found) -> list[str]:
    """What a harvest left, in lines for the terminal."""
    lines = [
        f"{name}: {store.rows:,} rows of {len(store.sites):,} sites, {store.nbytes / 1e9:.3f} GB "
        f"in {len(store.units):,} of {plan.units:,} units"
    ]
    for what, counts in (
        ("left out, as the disk was too slow", store.manifest.left_out),
        ("not finite", store.manifest.not_finite),
    ):
        rows = sum(each.rows for each in counts)
        if rows:
            lines.append(f"{rows:,} rows {what}; manifest.json has them by site and step")
    if found.lost:
        lines.append(f"{found.lost} workers were lost; others harvested their units")
    if found.stopped:
        lines.append("stopped before the limit; the same command with a larger one goes on")
    return [*lines, f"store: {store.path.resolve()}"]


def register(app: typer.Typer) -> None:
    app.command()(harvest)
