"""Site patterns: `<module path or glob>[:<port>[.<stream>]]`.

A glob matches whole parts of a dotted path: `*` any one part (or a piece of it, `attn*`), `**` any
number of parts, `[012]` one of these characters.
"""

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from dreamreader.errors import InvalidInput, UnknownName

WHOLE = ("out", "in", "delta")  # of any module
PORTS = (*WHOLE, "q", "k", "v", "heads", "probs")
STREAMS = ("image", "text")
_SIGNS = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Pattern:
    """A parsed site string."""

    path: str
    port: str = "out"
    stream: str | None = None

    @cached_property
    def is_glob(self) -> bool:
        return _SIGNS.search(self.path) is not None

    def matches(self, path: str) -> bool:
        return _regex(self.path).fullmatch(path) is not None


def parse(text: str) -> Pattern:
    """Split a site string into path, port and stream.

    Raises:
        InvalidInput: it is no string or has an empty path.
        UnknownName: the port or stream does not exist.

    Example:
        >>> parse("unet.**.attn2:heads")
        Pattern(path='unet.**.attn2', port='heads', stream=None)
    """
    if not isinstance(text, str):
        raise InvalidInput(f"a site is a string such as 'unet.mid_block:out', got {text!r}")
    return _parse(text)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Pattern:
    path, _, rest = text.partition(":")
    if not path or any(not part for part in path.split(".")):
        raise InvalidInput(f"site {text!r}: the path has an empty part")
    port, _, stream = (rest or "out").partition(".")
    if port not in PORTS:
        raise UnknownName("port", port, PORTS, f"It was asked for in site {text!r}")
    if stream and stream not in STREAMS:
        raise UnknownName("stream", stream, STREAMS, f"It was asked for in site {text!r}")
    if text.endswith((":", ".")):
        raise InvalidInput(f"site {text!r} ends in {text[-1]!r}")
    return Pattern(path, port, stream or None)


def join(path: str, port: str, stream: str | None) -> str:
    """The canonical name of a site: the port is left out where it is `out` without a stream."""
    if port == "out" and stream is None:
        return path
    return f"{path}:{port}" + (f".{stream}" if stream else "")


@lru_cache(maxsize=4096)
def _regex(glob: str) -> re.Pattern[str]:
    parts = glob.split(".")
    pieces = []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            pieces.append(r"(?:[^.]+\.)*[^.]+" if last else r"(?:[^.]+\.)*")
        else:
            pieces.append(_part(part) + ("" if last else r"\."))
    return re.compile("".join(pieces))


def _part(part: str) -> str:
    """One path part as a regular expression; brackets hold characters, never a negation."""
    pieces = re.split(r"(\[[^\]]*\]|\*|\?)", part)
    translated = {"*": "[^.]*", "?": "[^.]"}
    return "".join(
        translated.get(piece)
        or (
            f"[{re.escape(piece[1:-1])}]"
            if piece[:1] == "[" and piece[-1:] == "]"
            else re.escape(piece)
        )
        for piece in pieces
    )
