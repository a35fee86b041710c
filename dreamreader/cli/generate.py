"""`dreamreader generate`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from dreamreader.cli.errors import told
from dreamreader.errors import InvalidInput


@told
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts, each in quotes.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Embedded model, local folder, or hub id.")
    ] = "shapes-unet",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files.")] = Path(
        "pictures"
    ),
    seed: Annotated[
        int, typer.Option(help="First seed; picture i of all gets seed + i.", min=0)
    ] = 0,
    count: Annotated[int, typer.Option("--count", "-n", help="Pictures per prompt.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.", min=0.0)] = 4.0,
    edits: Annotated[
        Path | None, typer.Option(help="Edits saved by dreamreader.edits.save, or by the demo.")
    ] = None,
) -> None:
    """Draw pictures, with or without saved edits.

    \b
    Examples:
      dreamreader generate "a red circle" "a small blue star at the top left" --seed 3
      dreamreader generate "a red square" -n 8 --edits dreamreader-demo/edits
    """
    from dreamreader._files import replacing
    from dreamreader.cli.progress import console, progress
    from dreamreader.zoo.subject import open_reader

    if any(not prompt.strip() for prompt in prompts):
        raise InvalidInput("a prompt is empty")
    reader = open_reader(model)
    if not hasattr(reader.subject, "vae"):
        raise InvalidInput(
            f"{model} is a {type(reader.subject).__name__}; pictures need a diffusers pipeline"
        )
    changes = _read_edits(edits)
    rows = [prompt for prompt in prompts for _ in range(count)]
    with progress() as bar:
        task = bar.add_task("pictures", total=len(rows))
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            seeds = [seed + start + i for i in range(len(part))]
            result = reader.run(
                part, edits=changes, seeds=seeds, num_inference_steps=steps, guidance_scale=guidance
            )
            for prompt, number, image in zip(part, seeds, result.images, strict=True):
                with replacing(out / file_name(prompt, number)) as unfinished:
                    image.save(unfinished, format="PNG")
            bar.advance(task, len(part))
    console().print(f"{len(rows)} pictures in {out}")


BATCH = 16


def file_name(prompt: str, seed: int) -> str:
    """A file name that tells prompt and seed, of plain characters and bounded length."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:80].rstrip("-")
    return f"{words or 'picture'}-seed{seed}.png"


def _read_edits(path: Path | None) -> list:
    if path is None:
        return []
    if not path.exists():
        raise InvalidInput(f"{path}: no such file of edits")
    from dreamreader.edits import load

    return list(load(path))


def register(app: typer.Typer) -> None:
    app.command()(generate)
