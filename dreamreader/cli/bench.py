"""`dreamreader bench`."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from dreamreader.cli.errors import report_errors
from dreamreader.errors import InvalidInput


@report_errors
def bench(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Handed on to benchmarks/run.py; try -- --help.")
    ] = None,
) -> None:
    """Time the kernels beside plain torch; refuses to print a time whose result is wrong.

    \b
    Example:
      dreamreader bench
    """
    script = find_script()
    done = subprocess.run([sys.executable, str(script), *(arguments or [])])
    raise typer.Exit(done.returncode)


def find_script() -> Path:
    """`benchmarks/run.py` of the checkout that this package runs from.

    Raises:
        InvalidInput: the package is installed without the checkout.
    """
    script = Path(__file__).parents[2] / "benchmarks" / "run.py"
    if not script.is_file():
        raise InvalidInput(
            "the benchmarks are not part of the installed package: clone the repository, "
            'pip install -e ".[test]" there, and run `dreamreader bench`'
        )
    return script


def register(app: typer.Typer) -> None:
    app.command()(bench)
