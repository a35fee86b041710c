"""Errors that say what was asked for, what there is instead, and what to do."""

import difflib
from collections.abc import Iterable


class DreamreaderError(Exception):
    """Base class of every error that the library raises on purpose."""


class UnknownName(DreamreaderError, LookupError):
    """A site, model, branch, port or option that does not exist; names the nearest that do."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = ""):
        options = list(known)
        near = nearest(name, options) or options[:5]
        listed = ", ".join(near) if near else "none"
        super().__init__(
            f"unknown {kind} {name!r}; nearest: {listed}" + (f". {hint}" if hint else "")
        )


class InvalidInput(DreamreaderError, ValueError):
    """An argument that cannot be right: names the argument, what was expected and what came."""


class NeverFired(DreamreaderError, RuntimeError):
    """An edit or a recording that matched nothing in a run that is over."""


class ClockUnknown(DreamreaderError, RuntimeError):
    """Step, noise level or guidance branch was asked for where it cannot be known."""


class BrokenExtension(DreamreaderError, ImportError):
    """The native module is installed but cannot be loaded."""


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The options spelled most like `name`, best first; empty when none is close."""
    return difflib.get_close_matches(name, list(options), n=count, cutoff=0.4)


def check_text(text: str, name: str) -> None:
    """Refuse halves of characters, which no tokenizer or file takes.

    Raises:
        InvalidInput: the text cannot be encoded; says where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{name} is no text: character {error.start} is {text[error.start]!r}, the half of a "
            "surrogate pair"
        ) from None
