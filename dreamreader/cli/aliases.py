"""Older names of the commands of jobs: `harvest`, `reft train|show`, `probes train|show`."""

from pathlib import Path
from typing import Annotated

import typer

from dreamreader.cli.errors import report_errors
from dreamreader.cli.jobs import (
    Address,
    DryRun,
    EngineName,
    LimitGB,
    Out,
    Overrides,
    Workers,
    engine_of,
    run_job,
)
from dreamreader.cli.subject import SpecDevice, SpecDtype, with_subject
from dreamreader.cli.trained import show_adapter_file, show_probe_file

Spec = Annotated[Path, typer.Argument(help="Spec file: YAML or JSON.")]


@report_errors
def harvest(
    spec: Spec,
    overrides: Overrides = None,
    out: Out = None,
    limit_gb: LimitGB = None,
    dry_run: DryRun = False,
    engine: EngineName = "local",
    workers: Workers = None,
    address: Address = None,
    device: SpecDevice = None,
    dtype: SpecDtype = None,
) -> None:
    """Record chosen sites over many prompts: `dreamreader run` for a harvest.

    \b
    Examples:
      dreamreader harvest examples/harvest/attention.yaml --dry-run
      dreamreader harvest examples/harvest/attention.yaml -o activations --limit-gb 20
      dreamreader harvest examples/harvest/language.yaml data.limit=1000 -o activations
      dreamreader harvest examples/harvest/attention.yaml -o activations --engine ray --workers 2
    """
    options = {"limit_gb": limit_gb, "engine": engine_of(engine, workers, address)}
    given = with_subject(overrides, device, dtype)
    run_job(spec, given, out, dry_run, options, kind="harvest")


def _trainings(kind: str, what: str, example: str, shown: str, printed) -> typer.Typer:
    """`train` and `show` of one kind of training."""
    app = typer.Typer(
        help=f"{what}: train from a spec, look at.", no_args_is_help=True, rich_markup_mode=None
    )

    @report_errors
    def train(
        spec: Spec,
        overrides: Overrides = None,
        out: Out = None,
        dry_run: DryRun = False,
        device: SpecDevice = None,
        dtype: SpecDtype = None,
    ) -> None:
        run_job(spec, with_subject(overrides, device, dtype), out, dry_run, {}, kind=kind)

    @report_errors
    def show(file: Annotated[Path, typer.Argument(help="What a training left.")]) -> None:
        printed(file)

    train.__doc__ = f"""Train from a spec file: `dreamreader run` for {kind}.

    \b
    Examples:
      dreamreader {kind} train {example} --dry-run
      dreamreader {kind} train {example} -o {shown.partition("/")[0]}
    """
    show.__doc__ = f"""Print what was trained, and on what.

    \b
    Example:
      dreamreader {kind} show {shown}
    """
    app.command()(train)
    app.command()(show)
    return app


_REFT = "Learned edits (LoReFT and its variants)"
_PROBE = "colour/probes/unet.mid_block.safetensors"
reft = _trainings("reft", _REFT, "examples/reft/frame.yaml", "frame", show_adapter_file)
probes = _trainings(
    "probes", "Probes of activations", "examples/probes/colour.yaml", _PROBE, show_probe_file
)


def register(app: typer.Typer) -> None:
    app.command()(harvest)
    app.add_typer(reft, name="reft")
    app.add_typer(probes, name="probes")
