"""Cells: the units of a sweep. One cell is a set of sites in one selection."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dreamreader.engine import Box, parse
from dreamreader.errors import InvalidInput, UnknownName

Tokens = int | tuple[int, ...] | str | Box | None
Coordinate = str | int | float | tuple[str | int | float, ...]
ARROW = " → "  # between the ends of an edge, in names


@dataclass(frozen=True)
class Cell:
    """Where one row of a sweep is changed: a value that can be hashed and written as JSON.

    Args:
        name: of the place, such as `mid_block`; cells of one place may differ in the rest.
        sites: changed together; none for a row that stays as it is.
        steps: (start, stop), the first and the step behind the last; all where None.
        branch: guidance branch or branches; all where None.
        tokens: an index, several, a word of the prompt or a `Box`; all where None.
        heads: indices of heads; all where None.
        note: what a reader of the results must know, such as that a window is cut short.
        coordinates: where the cell lies on axes of the sweep's own, {name: value}: a source site
            and a target site, an edge, a pair of layers. Values are texts, numbers or tuples of
            them; kept as pairs in the order given, read as `cell.coordinate("source")`.

    Raises:
        InvalidInput: a field cannot be right.

    Example:
        >>> Cell("mid", ("unet.mid_block",), steps=(0, 5), branch="cond").label
        'mid · steps 0–4 · cond'
        >>> Cell("pair", (), coordinates={"layers": (3, 5)}).coordinate("layers")
        (3, 5)
    """

    name: str
    sites: tuple[str, ...]
    steps: tuple[int, int] | None = None
    branch: str | tuple[str, ...] | None = None
    tokens: Tokens = None
    heads: tuple[int, ...] | None = None
    note: str = ""
    coordinates: Mapping[str, Coordinate] | tuple[tuple[str, Coordinate], ...] = ()

    def __post_init__(self):
        sites = (self.sites,) if isinstance(self.sites, str) else tuple(self.sites)
        for site in sites:
            parse(site)
        self._set("sites", sites)
        self._set("steps", None if self.steps is None else window_of(self.steps))
        if self.branch is not None and not isinstance(self.branch, str):
            self._set("branch", tuple(self.branch))
        self._set("tokens", _tokens(self.tokens))
        if self.heads is not None:
            self._set("heads", indices_of(self.heads, "heads"))
        self._set("coordinates", _coordinates(self.coordinates))

    def coordinate(self, name: str) -> Coordinate:
        """The value of a coordinate.

        Raises:
            UnknownName: the cell has no such coordinate.
        """
        found = dict(self.coordinates)
        if name not in found:
            raise UnknownName("coordinate of a cell", name, found, f"The cell is {self.label!r}")
        return found[name]

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def window(self) -> range | None:
        """The steps as edits take them."""
        return None if self.steps is None else range(*self.steps)

    @property
    def selection(self) -> dict[str, Any]:
        """Steps, branch, tokens and heads as arguments of an edit."""
        tokens = list(self.tokens) if isinstance(self.tokens, tuple) else self.tokens
        heads = None if self.heads is None else list(self.heads)
        return {"steps": self.window, "branch": self.branch, "tokens": tokens, "heads": heads}

    @property
    def place(self) -> str:
        """Name, coordinates, heads, tokens and branch: everything but the time."""
        said = [*self._describe_heads(), *self._describe_tokens(), *self._branches()]
        return " · ".join([self.name, *self._describe_coordinates(), *said])

    @property
    def time(self) -> str:
        """The steps in words."""
        if self.steps is None:
            return "all steps"
        start, stop = self.steps
        return f"step {start}" if stop == start + 1 else f"steps {start}–{stop - 1}"

    @property
    def label(self) -> str:
        """Everything that tells this cell from others, for tables."""
        parts = [
            self.name,
            *self._describe_coordinates(),
            *self._describe_heads(),
            *self._describe_tokens(),
        ]
        parts += [self.time] if self.steps is not None else []
        return " · ".join([*parts, *self._branches(), *([self.note] if self.note else [])])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and tables; coordinates only where there are some."""
        found: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        ends = dict(found.pop("coordinates"))
        if ends:
            found["coordinates"] = {
                k: list(v) if isinstance(v, tuple) else v for k, v in ends.items()
            }
        if isinstance(self.tokens, Box):
            box = self.tokens
            found["tokens"] = {"box": [box.left, box.top, box.right, box.bottom]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Cell":
        """The cell that `as_dict` wrote.

        Raises:
            UnknownName: there is no such field.
            InvalidInput: a field cannot be right.
        """
        known = [each.name for each in fields(cls)]
        for name in values:
            if name not in known:
                raise UnknownName("field of a cell", name, known)
        for name in ("name", "sites"):
            if name not in values:
                raise InvalidInput(f"a cell needs {name}, got {sorted(values)}")
        ready = dict(values)
        tokens = ready.get("tokens")
        if isinstance(tokens, Mapping):
            if set(tokens) != {"box"} or len(tokens["box"]) != 4:
                raise InvalidInput(
                    f"tokens: {{'box': [left, top, right, bottom]}} expected, got {tokens!r}"
                )
            ready["tokens"] = Box(*tokens["box"])
        return cls(**ready)

    def _describe_coordinates(self) -> list[str]:
        """Coordinates in words, where they are not the name itself."""
        shown = {
            key: "–".join(map(str, each)) if isinstance(each, tuple) else str(each)
            for key, each in dict(self.coordinates).items()
        }
        if self.name == ARROW.join(shown.values()):
            return []
        return [f"{key} {value}" for key, value in shown.items()]

    def _describe_heads(self) -> list[str]:
        if self.heads is None:
            return []
        return [("head " if len(self.heads) == 1 else "heads ") + ", ".join(map(str, self.heads))]

    def _describe_tokens(self) -> list[str]:
        if self.tokens is None:
            return []
        if isinstance(self.tokens, str):
            return [f"word {self.tokens!r}"]
        if isinstance(self.tokens, Box):
            box = self.tokens
            return [f"box {box.left:g} {box.top:g} {box.right:g} {box.bottom:g}"]
        if isinstance(self.tokens, tuple):
            return ["tokens " + ", ".join(map(str, self.tokens))]
        return [f"token {self.tokens}"]

    def _branches(self) -> list[str]:
        if self.branch is None:
            return []
        return [self.branch if isinstance(self.branch, str) else "+".join(self.branch)]


def window_of(value: Any) -> tuple[int, int]:
    """(start, stop) from a pair, a range, a slice or a single step."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value + 1)
    if isinstance(value, range) and value.step == 1:
        value = (value.start, value.stop)
    if isinstance(value, slice) and value.step in (None, 1) and value.stop is not None:
        value = (value.start or 0, value.stop)
    if not isinstance(value, tuple | list) or [type(each) for each in value] != [int, int]:
        raise InvalidInput(f"steps of a cell are (start, stop), got {value!r}")
    start, stop = value
    if not 0 <= start < stop:
        raise InvalidInput(f"steps of a cell need 0 <= start < stop, got ({start}, {stop})")
    return start, stop


def _tokens(value: Any) -> Tokens:
    if value is None or isinstance(value, str | Box):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, range | list | tuple):
        return indices_of(value, "tokens")
    raise InvalidInput(
        f"tokens of a cell are an index, indices, a word or a Box, got {type(value).__name__} "
        f"{value!r}"
    )


def indices_of(value: Any, name: str) -> tuple[int, ...]:
    """One index or several as a tuple."""
    listed = (value,) if isinstance(value, int) else tuple(value)
    if not listed or any(isinstance(e, bool) or not isinstance(e, int) for e in listed):
        raise InvalidInput(f"{name} of a cell are indices, got {value!r}")
    return listed


def _coordinates(value: Any) -> tuple[tuple[str, Coordinate], ...]:
    """Pairs of a name and a value that can be hashed and written as JSON."""
    try:
        pairs = dict(value)
    except (TypeError, ValueError):
        raise InvalidInput(f"coordinates of a cell are {{name: value}}, got {value!r}") from None
    found: list[tuple[str, Coordinate]] = []
    for name, each in pairs.items():
        listed = tuple(each) if isinstance(each, list | tuple) else (each,)
        if not isinstance(name, str) or not name or not listed or not all(map(_is_plain, listed)):
            raise InvalidInput(
                f"coordinate {name!r} of a cell: a text, a number or a tuple of them is needed, "
                f"got {each!r}"
            )
        found.append((name, listed if isinstance(each, list | tuple) else each))
    return tuple(found)


def _is_plain(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
