"""`dreamreader probes`: classifiers and regressors of activations, trained from spec files."""

from pathlib import Path
from typing import Annotated

import typer

from dreamreader.cli.errors import check_folder, told
from dreamreader.cli.run import Overrides, Spec
from dreamreader.cli.subject import SpecDevice, SpecDtype, with_subject
from dreamreader.errors import InvalidInput

app = typer.Typer(
    help="Probes of activations: train from a spec, look at.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
@told
def train(
    spec: Spec,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the probes.")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print sites, rows, labels and time; a few rows are run.")
    ] = False,
    device: SpecDevice = None,
    dtype: SpecDtype = None,
) -> None:
    """Train a probe at each site; a stopped training goes on after its last probe.

    \b
    Examples:
      dreamreader probes train examples/probes/colour.yaml --dry-run
      dreamreader probes train examples/probes/colour.yaml -o colour
      dreamreader probes train examples/probes/colour.yaml probe.hidden=[] -o linear
    """
    from dreamreader.cli.progress import console, stages
    from dreamreader.training import ProbeJob

    job = ProbeJob.from_file(spec, with_subject(overrides, device, dtype))
    if dry_run:
        console().print(job.spec.name)
        console().print(job.plan())
        return
    if out is None:
        raise InvalidInput("give --out, the folder of the probes; or --dry-run")
    check_folder(out)
    with stages() as report:
        probes = job.run(out, told=report)
    console().print(f"{job.spec.name}: {len(probes)} probes")
    for site, probe in probes.items():
        console().print(f"  {site}: {_reached(probe)}")
    console().print(f"report: {(out / 'report.html').resolve()}")


@app.command()
@told
def show(
    file: Annotated[Path, typer.Argument(help="File of a probe.")],
) -> None:
    """Print the card of a probe: what it was trained on, and what it and its controls reach.

    \b
    Example:
      dreamreader probes show colour/probes/unet.mid_block.safetensors
    """
    from dreamreader.cli.progress import console, table
    from dreamreader.probes import Probe

    if not file.is_file():
        raise InvalidInput(f"{file}: no such file; probes are in the folder probes of a training")
    card = Probe.load(file).card
    facts = table("", "")
    for name, value in card.facts():
        facts.add_row(name, value)
    facts.show_header = False
    console().print(facts)
    head, lines = card.table()
    listed = table(*head, right=tuple(head[2:]))
    for line in lines:
        listed.add_row(*line)
    console().print(listed)


def _reached(probe) -> str:
    from dreamreader.training.probe_page import reached

    kind = "R2" if probe.task.kind == "regress" else "accuracy"
    shown = "{:.3f}" if kind == "R2" else "{:.1%}"
    return ", ".join(
        f"{kind}{' of ' + name if name else ''} {shown.format(value)}"
        for name, value in reached(probe.card).items()
    )
