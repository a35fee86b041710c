"""`dreamreader generate`."""

import io
import itertools
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from dreamreader.cli.errors import check_folder, report_errors
from dreamreader.cli.subject import Device, Dtype
from dreamreader.errors import InvalidInput

MODEL = "shapes-unet"
BATCH = 16


@report_errors
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts, each in quotes.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Embedded model, folder of a pipeline, or hub id.")
    ] = MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files.")] = Path(
        "pictures"
    ),
    seed: Annotated[
        int, typer.Option(help="First seed; picture i of all gets seed + i.", min=0)
    ] = 0,
    count: Annotated[int, typer.Option("--count", "-n", help="Pictures per prompt.", min=1)] = 1,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps. [default: 20 of embedded models, else the pipeline's]",
            show_default=False,
            min=1,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale. [default: 2 of embedded models, else the pipeline's]",
            show_default=False,
            min=0.0,
        ),
    ] = None,
    edits: Annotated[
        Path | None,
        typer.Option(
            help="Edits of dreamreader.edits.save: a file, or a folder of such files, in the "
            "order of their names."
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Draw pictures, with or without saved edits; none replaces another picture.

    A name has the prompt and seed, and what was given beside them: model, steps, guidance, edits.
    Where another picture has that name, a number comes after it.

    \b
    Examples:
      dreamreader generate "a red circle" "a small blue star at the top left" --seed 3
      dreamreader generate "a red square" -n 8 --edits dreamreader-demo/edits
      dreamreader generate "a red square" -m ./my-pipeline --device cuda --dtype bfloat16
    """
    from dreamreader._progress import part_of, terminal_display
    from dreamreader.cli.console import console
    from dreamreader.zoo import MODELS, SETTINGS, load

    if any(not prompt.strip() for prompt in prompts):
        raise InvalidInput("a prompt is empty")
    check_folder(out)
    files = edit_files(edits)
    changes = _read_edits(files)
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    given = {name: value for name, value in given.items() if value is not None}
    reader = load(model, device, dtype)
    if not hasattr(reader.subject, "vae"):
        raise InvalidInput(
            f"{model} is a {type(reader.subject).__name__}; pictures need a diffusers pipeline"
        )
    settings = {**(SETTINGS if model in MODELS else {}), **given}
    tags = _tags(model, steps, guidance, files)
    rows = [prompt for prompt in prompts for _ in range(count)]
    moved = []
    with terminal_display(console(stderr=True)) as display:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            seeds = [seed + start + i for i in range(len(part))]
            follow = part_of(display, start, len(rows), "pictures")
            result = reader.run(part, edits=changes, seeds=seeds, progress=follow, **settings)
            for prompt, number, image in zip(part, seeds, result.images, strict=True):
                wanted = out / file_name(prompt, number, tags)
                if (written := save_beside(image, wanted)) != wanted:
                    moved.append(f"{wanted.name} -> {written.name}")
    console().print(f"{len(rows)} pictures in {out}")
    if moved:
        more = f" and {len(moved) - 3} others" if len(moved) > 3 else ""
        console().print(f"other pictures had these names, and stay: {', '.join(moved[:3])}{more}")


def edit_files(path: Path | None) -> list[Path]:
    """The files of edits that a path names: itself, or those in the folder, in order of names.

    Raises:
        InvalidInput: there is no such file or folder, or no file of edits in it.
    """
    if path is None:
        return []
    if not path.exists():
        raise InvalidInput(f"{path}: no such file or folder of edits")
    if not path.is_dir():
        return [path]
    if not (files := sorted(path.glob("*.safetensors"))):
        raise InvalidInput(f"{path}: no file of edits in this folder (*.safetensors)")
    return files


def file_name(prompt: str, seed: int, tags: tuple[str, ...] = ()) -> str:
    """A file name that tells prompt, seed and tags, of plain characters and bounded length."""
    words = [f"{_plain(prompt) or 'picture'}-seed{seed}", *filter(None, map(_plain, tags))]
    return f"{'-'.join(words)[:200]}.png"


def save_beside(image: Any, path: Path) -> Path:
    """Writes a PNG; where another picture has this name, a number is put after it.

    Returns:
        The path at which the picture is now.
    """
    from dreamreader._files import write_atomic

    data = io.BytesIO()
    image.save(data, format="PNG")
    for number in itertools.count(1):
        target = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        if not target.exists():
            return write_atomic(target, data.getvalue())
        if target.is_file() and target.read_bytes() == data.getvalue():
            return target
    raise AssertionError


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80].rstrip("-.")


def _tags(
    model: str, steps: int | None, guidance: float | None, files: list[Path]
) -> tuple[str, ...]:
    """What was given beside prompt and seed."""
    named = [] if model == MODEL else [Path(model).name]
    named += [] if steps is None else [f"steps{steps}"]
    named += [] if guidance is None else [f"guidance{guidance:g}"]
    return (*named, *(file.stem for file in files))


def _read_edits(files: list[Path]) -> list[Any]:
    if not files:
        return []
    from dreamreader.edits import load

    return [edit for file in files for edit in load(file)]


def register(app: typer.Typer) -> None:
    app.command()(generate)
