"""`dreamreader plan` and `dreamreader schema`: specs without running them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dreamreader.cli.errors import told
from dreamreader.cli.run import Overrides, Spec
from dreamreader.cli.subject import SpecDevice, SpecDtype, with_subject


@told
def plan(
    spec: Spec,
    overrides: Overrides = None,
    device: SpecDevice = None,
    dtype: SpecDtype = None,
) -> None:
    """Print what a spec would do: rows, batches, sites, estimated memory and time.

    Opens the subject and runs one row for one step, to learn shapes and times.

    \b
    Example:
      dreamreader plan examples/patch-colour.yaml seeds=16
    """
    from dreamreader.cli.progress import console
    from dreamreader.experiments import Experiment

    experiment = Experiment.from_file(spec, with_subject(overrides, device, dtype))
    console().print(f"{experiment.spec.name}: {experiment.spec.method.kind}")
    console().print(repr(experiment.plan()))


@told
def schema(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File instead of standard output.")
    ] = None,
) -> None:
    """Print the JSON schema of spec files, for editors.

    With `# yaml-language-server: $schema=spec.schema.json` in its first line an editor checks and
    completes a spec.

    \b
    Example:
      dreamreader schema --out spec.schema.json
    """
    from dreamreader._files import write_atomic
    from dreamreader.experiments import Spec as Model

    text = json.dumps(Model.model_json_schema(), indent=2) + "\n"
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_atomic(out, text)


def register(app: typer.Typer) -> None:
    app.command()(plan)
    app.command()(schema)
