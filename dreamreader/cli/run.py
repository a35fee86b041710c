"""`dreamreader run`: an experiment from a spec file."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from dreamreader.cli.errors import check_folder, told
from dreamreader.cli.subject import SpecDevice, SpecDtype, with_subject

Spec = Annotated[Path, typer.Argument(help="Spec file: YAML or JSON.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value with a dotted key, e.g. seeds=4.")
]


@told
def run(
    spec: Spec,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder. [default: runs/<name>]")
    ] = None,
    device: SpecDevice = None,
    dtype: SpecDtype = None,
    show: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Run an experiment; a stopped run goes on where it was, a complete one is left as it is.

    \b
    Examples:
      dreamreader run examples/patch-colour.yaml
      dreamreader run examples/steer-colour.yaml seeds=4 method.strengths=[0,2,4] -o runs/steer
    """
    from dreamreader.cli.progress import console, progress
    from dreamreader.experiments import Experiment
    from dreamreader.experiments.page import summary

    check_folder(out)
    experiment = Experiment.from_file(spec, with_subject(overrides, device, dtype))
    with progress() as bar:
        task = bar.add_task("rows", total=None)

        def started(plan, done: int) -> None:
            bar.update(task, total=len(plan.rows), completed=done)
            note = f" ({done:,} are there)" if done else ""
            console(stderr=True).print(
                f"{len(plan.rows):,} rows{note} in {len(plan.units):,} batches of {plan.batch}"
            )

        results = experiment.run(out, started=started, advance=lambda rows: bar.advance(task, rows))
        bar.update(task, total=len(results.rows), completed=len(results.rows))
    for line in summary(results):
        console().print(line)
    if show:
        webbrowser.open((results.folder.path / "report.html").resolve().as_uri())


def register(app: typer.Typer) -> None:
    app.command()(run)
