"""`dreamreader reft`: learned edits, trained from spec files."""

from pathlib import Path
from typing import Annotated

import typer

from dreamreader.cli.errors import check_folder, told
from dreamreader.cli.run import Overrides, Spec
from dreamreader.cli.subject import SpecDevice, SpecDtype, with_subject
from dreamreader.errors import InvalidInput

app = typer.Typer(
    help="Learned edits (LoReFT and its variants): train from a spec, look at.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
@told
def train(
    spec: Spec,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the adapters.")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print sites, parameters, calls, memory and time; a few are run.")
    ] = False,
    device: SpecDevice = None,
    dtype: SpecDtype = None,
) -> None:
    """Train adapters; a stopped training goes on where it was, a complete one is left as it is.

    \b
    Examples:
      dreamreader reft train examples/reft/frame.yaml --dry-run
      dreamreader reft train examples/reft/frame.yaml -o frame
      dreamreader reft train examples/reft/frame.yaml training.rank=2 training.loss=noise -o noise
    """
    from dreamreader.cli.progress import console, stages
    from dreamreader.training import ReftJob

    job = ReftJob.from_file(spec, with_subject(overrides, device, dtype))
    if dry_run:
        console().print(job.spec.name)
        console().print(repr(job.plan()))
        return
    if out is None:
        raise InvalidInput("give --out, the folder of the adapters; or --dry-run")
    check_folder(out)
    with stages() as report:
        job.run(out, told=report)
    for line in summary(job.spec, out):
        console().print(line)


@app.command()
@told
def show(
    file: Annotated[Path, typer.Argument(help="adapter.safetensors, or its folder.")],
) -> None:
    """Print the sites, shapes and parameters of trained adapters.

    \b
    Example:
      dreamreader reft show frame
    """
    from dreamreader.cli.progress import console, table
    from dreamreader.reft import Reft
    from dreamreader.training.reft import ADAPTER

    path = file / ADAPTER if file.is_dir() else file
    if not path.is_file():
        raise InvalidInput(f"{path}: no such file")
    reft = Reft.load(path)
    listed = table("site", "width", "rank", "parameters", right=("width", "rank", "parameters"))
    for site, adapter in reft.adapters.items():
        count = sum(each.numel() for each in adapter.parameters())
        listed.add_row(site, str(adapter.width), str(adapter.rank), f"{count:,}")
    console().print(listed)
    steps = "the same at all steps" if reft.steps is None else f"one for each of {reft.steps} steps"
    tokens = "all tokens" if reft.tokens is None else f"tokens {reft.tokens}"
    console().print(f"{reft.variant}, {steps}, {tokens}")
    reft.print_trainable_parameters()


def summary(spec, out: Path) -> list[str]:
    """What a training left, in lines for the terminal."""
    from dreamreader.training.folder import RESULT, TrainingFolder
    from dreamreader.training.reft_page import parameters, reached

    result = TrainingFolder(out).need(RESULT)
    share, prompts = reached(result), result["prompts"]
    lines = [
        f"{spec.name}: {parameters(result):,} parameters at {len(result['sites'])} sites, best at "
        f"step {result['best']:,} of {result['steps']:,}"
    ]
    if share is not None:
        lines.append(
            f"{100 * share:.1f} % of the difference explained on {prompts['held_out']:,} held-out "
            f"prompts, {prompts['trained']:,} trained"
        )
    return [*lines, f"report: {(out / 'report.html').resolve()}"]
