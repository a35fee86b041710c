"""`dreamreader demo`."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from dreamreader.cli.errors import check_folder, report_errors
from dreamreader.cli.subject import Device, Dtype


@report_errors
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the report, edits and jobs.")
    ] = Path("dreamreader-demo"),
    model: Annotated[
        str, typer.Option("--model", "-m", help="Embedded model or pipeline folder of its world.")
    ] = "shapes-unet",
    source: Annotated[str, typer.Option("--from", help="Colour that the prompts name.")] = "red",
    target: Annotated[str, typer.Option("--to", help="Colour to steer to.")] = "blue",
    seed: Annotated[int, typer.Option(help="Draws prompts and noise.", min=0)] = 0,
    small: Annotated[
        bool, typer.Option("--small", help="A tenth of the pictures, for a quick look.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    show: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Turn red into blue inside a model, measure it against controls, and write a report.

    A demo that was stopped goes on with the same command. Its folder has a job for each part, for
    show, verify and diff.

    \b
    Examples:
      dreamreader demo
      dreamreader demo --from green --to purple --out green-to-purple --open
    """
    from dreamreader._progress import terminal_display
    from dreamreader.cli.console import console
    from dreamreader.demo import DemoPlan, run_demo
    from dreamreader.zoo import load

    check_folder(out)
    subject = {"model": model, "device": device, "dtype": dtype}
    plan = DemoPlan(source=source, target=target, seed=seed, subject=subject)
    reader = load(model, device, dtype)
    try:
        with terminal_display(console(stderr=True)) as display:
            result = run_demo(reader, plan.small() if small else plan, out, display)
    except KeyboardInterrupt:
        console(stderr=True).print(
            "the same command goes on after the last pictures that are there"
        )
        raise
    console().print(result.summary())
    report = (out / "report.html").resolve()
    console().print(f"report: {report}")
    if show:
        webbrowser.open(report.as_uri())


def register(app: typer.Typer) -> None:
    app.command()(demo)
