"""The nearest of many dotted paths, compared part by part."""

import difflib
import fnmatch
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

Meaning = tuple[tuple[str, ...], ...]

_MISSING = 0.4  # parts that the name leaves out, one after the other
_MORE = 0.05  # each further one of them
_SURPLUS = 0.9  # a part of the name that the path does not have
_OTHER = 1.0  # a part with another name altogether
_BEHIND = 0.3  # how much farther than the best another may be


def nearest_paths(name: str, paths: Sequence[str], count: int) -> list[str]:
    """The paths most like a dotted name or glob, best first; of a glob, the globs put right.

    Args:
        name: parts joined by dots, or a colon before a port; `**` stands for any number of parts.
        paths: what there is.
        count: the most to give.
    """
    asked = _parts(name)
    plain = [part for part in asked if part != "**"]
    is_glob = any(sign in name for sign in "*?[")
    scored = []
    for place, path in enumerate(paths):
        cost, meaning = _align(asked, _parts(path))
        scored.append((cost, place, _glob(name, meaning) if is_glob else path))
    scored.sort()
    far = min(0.5 * len(plain) + 0.35, scored[0][0] + _BEHIND) if scored else 0.0
    return list(dict.fromkeys(text for cost, _, text in scored if cost <= far))[:count]


def _parts(path: str) -> list[str]:
    return re.split(r"[.:](?![^\[]*\])", path)


def _glob(name: str, meaning: Meaning) -> str:
    """The glob put right: for each of its parts, those that stand there now."""
    marks = ["", *re.findall(r"[.:](?![^\[]*\])", name)]
    text = ""
    for mark, parts in zip(marks, meaning, strict=True):
        for part in parts:
            if part == "**" and (text == "**" or text.endswith(".**")):
                continue
            text += ("." if part == "**" and mark == ":" else mark or ".") * bool(text) + part
    return text


def _align(asked: Sequence[str], path: Sequence[str]) -> tuple[float, Meaning]:
    """The least cost at which a name is a path, and what stands for each of its parts then."""
    # row[j]: the asked parts so far against the first j parts of the path
    row = [_Way(0.0, False, ())]
    row += [_Way(_MISSING + _MORE * j, True, ()) for j in range(len(path))]
    for part in asked:
        new: list[_Way] = []
        for j, before in enumerate(row):
            ways = [before.then(0.0, part) if part == "**" else before.then(_SURPLUS)]
            if j and part == "**":
                ways.append(new[j - 1])
            elif j:
                own, price = path[j - 1], _price(part, path[j - 1])
                stands = part if price == 0 else own
                gap = ("**",) if row[j - 1].gap else ()
                ways.append(row[j - 1].then(price, *gap, stands))
                ways.append(new[j - 1].skipping())
            new.append(min(ways, key=lambda way: way.cost))
        row = new
    return row[-1].cost, row[-1].meaning


class _Way(NamedTuple):
    """How the first parts of a name can be the first parts of a path.

    Attributes:
        gap: whether the last part of the path is one that the name leaves out.
        meaning: for each part of the name, what stands there.
    """

    cost: float
    gap: bool
    meaning: Meaning

    def then(self, price: float, *parts: str) -> "_Way":
        return _Way(self.cost + price, False, (*self.meaning, parts))

    def skipping(self) -> "_Way":
        return _Way(self.cost + (_MORE if self.gap else _MISSING), True, self.meaning)


@lru_cache(maxsize=65536)
def _price(asked: str, own: str) -> float:
    if asked == own or (any(sign in asked for sign in "*?[") and fnmatch.fnmatch(own, asked)):
        return 0.0
    if asked.isdigit() and own.isdigit():
        return 0.4 + 0.01 * min(abs(int(asked) - int(own)), 9)  # another block of the same kind
    likeness = difflib.SequenceMatcher(None, asked.strip("*?"), own).ratio()
    return 1 - likeness if likeness >= 0.5 else _OTHER
