"""`dreamreader demo`."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from dreamreader.cli.errors import check_folder, told
from dreamreader.cli.subject import Device, Dtype


@told
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for report.html, results.json and edits.")
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

    \b
    Examples:
      dreamreader demo
      dreamreader demo --from green --to purple --out green-to-purple --open
    """
    from dreamreader.cli.progress import console, progress
    from dreamreader.demo import DemoPlan, run_demo
    from dreamreader.zoo import load

    check_folder(out)
    plan = DemoPlan(source=source, target=target, seed=seed)
    reader = load(model, device, dtype)
    with progress() as bar:
        result = run_demo(reader, plan.small() if small else plan, out, bar)
    console().print(result.summary())
    report = (out / "report.html").resolve()
    console().print(f"report: {report}")
    if show:
        webbrowser.open(report.as_uri())


def register(app: typer.Typer) -> None:
    app.command()(demo)
