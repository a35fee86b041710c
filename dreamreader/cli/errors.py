"""What a person sees when something is wrong: one message and an exit code, not a traceback."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from dreamreader.errors import DreamreaderError, InvalidInput, first_line

USER_ERROR = 2
INTERRUPTED = 130


def report_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the library's and the system's errors, and Ctrl-C, turned into messages.

    Errors that the library does not raise on purpose keep their traceback: they are bugs.
    """

    @functools.wraps(command)
    def run_command(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except DreamreaderError as error:
            raise fail(str(error)) from None
        except BrokenPipeError:  # the reader of a pipe has gone, such as `head`
            raise
        except OSError as error:
            named = error.filename2 or error.filename  # of a renaming, the name it was to have
            reason = error.strerror or first_line(error)
            raise fail(reason if named is None else f"{named}: {reason}") from None
        except KeyboardInterrupt:
            typer.echo("\nstopped; no file was left half-written", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return run_command


def check_folder(path: Path | None) -> None:
    """Refuses, before any work, a folder for results that cannot be one; None is the default.

    Raises:
        InvalidInput: there is a file of this name, or nothing can be written there.
    """
    if path is None:
        return
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise InvalidInput(f"{there} is a file; --out names a folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InvalidInput(
            f"nothing can be written in {there}: {error.strerror}; --out names another folder"
        ) from error


def fail(message: str) -> typer.Exit:
    """Prints `error: <message>` to stderr; returns what to raise."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(USER_ERROR)
