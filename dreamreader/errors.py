"""Errors that say what was asked for, what there is instead, and what to do."""

import difflib
import os
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path


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


class MissingFile(InvalidInput, FileNotFoundError):
    """A file to be read that is not there: names it, and the nearest that are."""

    def __init__(self, path: str | os.PathLike[str]):
        wanted = Path(path)
        there = next((each for each in wanted.absolute().parents if each.is_dir()), Path("/"))
        if there != wanted.absolute().parent:
            hint = f"the folder {wanted.parent} is not there either"
        else:
            names = sorted(each.name for each in there.iterdir() if each.name[0] != ".")
            near = nearest(wanted.stem, names) or names[:5]
            hint = f"nearest in {there}: {', '.join(near)}" if near else f"{there} is empty"
        super().__init__(f"{os.fspath(path)}: no such file; {hint}")


class NeverFired(DreamreaderError, RuntimeError):
    """An edit or a recording that matched nothing in a run that is over."""


class ClockUnknown(DreamreaderError, RuntimeError):
    """Step, noise level or guidance branch was asked for where it cannot be known."""


class BrokenExtension(DreamreaderError, ImportError):
    """The native module is installed but cannot be loaded."""


def nearest(name: str, options: Iterable[str], count: int = 3, cutoff: float = 0.4) -> list[str]:
    """The options most like `name`, best first; empty when none is close.

    Dotted paths are compared part by part, so that a typo counts however long the path is. A glob
    comes back as a glob, with the parts that match nothing put right.

    Args:
        name: what was asked for. options: what there is.
        count: the most to give.
        cutoff: the least likeness of names without dots, from 0 to 1.

    Example:
        >>> nearest("unet.**.atn2", ["unet.down.0.attn1", "unet.down.0.attn2", "vae.encoder"])
        ['unet.**.attn2', 'unet.**.attn1']
    """
    listed = list(options)
    if re.search(r"[.:*?\[]", name):
        from dreamreader._paths import nearest_paths

        return nearest_paths(name, listed, count)
    found = difflib.get_close_matches(name, listed, n=count, cutoff=cutoff)
    return found or [each for each in listed if each and name.startswith(each)][:count]


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line of whole words."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0], 300, placeholder=" ...")


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
