"""What a person sees when something is wrong: one message and an exit code, not a traceback."""

import functools
from collections.abc import Callable
from typing import Any

import typer

from dreamreader.errors import DreamreaderError

USER_ERROR = 2
INTERRUPTED = 130


def told(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the library's errors and Ctrl-C turned into a message and an exit code.

    Errors that the library does not raise on purpose keep their traceback: they are bugs.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except DreamreaderError as error:
            raise fail(str(error)) from None
        except (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            raise fail(f"{error.filename}: {error.strerror}") from None
        except KeyboardInterrupt:
            typer.echo("\nstopped; no file was left half-written", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def fail(message: str) -> typer.Exit:
    """Prints `error: <message>` to stderr; returns what to raise."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(USER_ERROR)
