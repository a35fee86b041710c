"""The root command, which gathers the others."""

import os
from typing import Annotated

import typer

from dreamreader.cli import aliases, bench, demo, doctor, generate, jobs, sae, sites, store, zoo

HELP = """Read and change what happens inside diffusion pipelines and language models.

\b
Examples:
  dreamreader demo                               steer a model, measured, in two minutes
  dreamreader run examples/patch-colour.yaml     a job from a file: experiment, harvest, training
  dreamreader plan examples/harvest/attention.yaml   what it would do and take
  dreamreader runs                               the jobs in runs/, and how far each is
  dreamreader sites shapes-unet "unet.**.attn2"  where an edit can go
  dreamreader generate "a red circle" --seed 3   pictures from an embedded model
  dreamreader doctor                             which kernels run here, and why
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (demo, jobs, sites, generate, doctor, bench, aliases):
    command.register(app)
app.add_typer(zoo.app, name="zoo")
app.add_typer(store.app, name="store")
app.add_typer(sae.app, name="sae")


def _version(wanted: bool) -> None:
    if wanted:
        from dreamreader import __version__

        typer.echo(f"dreamreader {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _spin_briefly() -> None:
    """Let OpenMP's threads sleep soon where they wait for others: spinning takes their cores.

    GNU's OpenMP reads this when torch loads it, so it has to be said before; what the user said of
    waiting stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main() -> None:
    """Entry point of the `dreamreader` script."""
    _spin_briefly()
    app(prog_name="dreamreader")
