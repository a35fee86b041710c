"""`dreamreader doctor`."""

from typing import Annotated

import typer

from dreamreader.cli.errors import report_errors


@report_errors
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say which kernels run here, which do not, and why.

    \b
    Example:
      dreamreader doctor --json
    """
    import json as encode

    from dreamreader import doctor as checks

    found = checks.report()
    typer.echo(encode.dumps(found, indent=2, default=str) if json else checks.render(found))


def register(app: typer.Typer) -> None:
    app.command()(doctor)
