"""`dreamreader sites`."""

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreamreader.cli.errors import report_errors
from dreamreader.cli.subject import MODEL_HELP, Device, Dtype

if TYPE_CHECKING:
    from dreamreader.engine import Reader, Site

SMALL = 200_000_000  # parameters below which a step costs less than a second


@report_errors
def sites(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    pattern: Annotated[
        str, typer.Argument(help="Site or glob, with an optional :port. Quote it.")
    ] = "**",
    shapes: Annotated[
        bool | None,
        typer.Option(
            "--shapes/--no-shapes",
            help="Run one step to learn shapes. [default: only below 200 M parameters]",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """List the places of a model that can be read and changed, with ports and shapes.

    \b
    Examples:
      dreamreader sites shapes-unet
      dreamreader sites shapes-unet "unet.**.attn2:heads"
      dreamreader sites ./my-pipeline "transformer.**.attn:q" --json
      dreamreader sites openai-community/gpt2 "**.attn:heads" --no-shapes
    """
    import json as encode

    from dreamreader.cli.console import console, table
    from dreamreader.zoo import load

    reader = load(model, device, dtype)
    if shapes if shapes is not None else _parameters(reader) < SMALL:
        _run_one_step(reader, pattern)
    rows = [_describe(site) for site in reader.sites(pattern)]
    if json:
        typer.echo(encode.dumps(rows, indent=2))
        return
    listed = table("site", "module", "shape", "ports")
    for row in rows:
        shape = " x ".join(map(str, row["shape"] or ()))
        listed.add_row(row["site"], row["module"], shape, " ".join(row["ports"]))
    console().print(listed)
    note = "" if any(row["shape"] for row in rows) else "; --shapes runs one step to learn shapes"
    console(stderr=True).print(f"{len(rows)} sites; shape is rows x tokens x features{note}")


def _describe(site: "Site") -> dict[str, Any]:
    return {
        "site": site.name,
        "module": site.module_class,
        "ports": list(site.ports),
        "shape": list(site.shape) if site.shape else None,
        "heads": site.heads,
    }


def _parameters(reader: "Reader") -> int:
    parts = getattr(reader.subject, "components", {"": reader.subject}).values()
    modules = [part for part in parts if hasattr(part, "parameters")]
    return sum(p.numel() for module in modules for p in module.parameters())


def _run_one_step(reader: "Reader", pattern: str) -> None:
    """Lets the sites see values once; those that do not run have no shape."""
    from dreamreader.edits import Edit
    from dreamreader.errors import DreamreaderError

    # An edit that changes nothing: unlike a recording, it may sit at modules that run more than
    # once. Ports that cannot be written, such as probs, stay without a shape.
    watch = Edit(pattern, lambda x: None)
    arguments: dict[str, Any] = {}
    if hasattr(reader.subject, "scheduler"):
        arguments["num_inference_steps"] = 1
    with contextlib.suppress(DreamreaderError):
        reader.run("a", edits=watch, seeds=0, **arguments)


def register(app: typer.Typer) -> None:
    app.command()(sites)
