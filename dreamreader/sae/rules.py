"""Rules that are objects, or have the name of a published one."""

from collections.abc import Mapping
from typing import Any, TypeVar

from dreamreader.errors import InvalidInput, UnknownName

R = TypeVar("R")


def resolve_rule(
    given: Any, kind: type[R], published: Mapping[str, R], option: str, what: str
) -> R:
    """A rule, or the published one of a name.

    Args:
        kind: of rules. published: by name. option: what the argument is called. what: a rule is.

    Raises:
        UnknownName: there is none of this name.
        InvalidInput: it is no rule.
    """
    if isinstance(given, kind):
        return given
    if not isinstance(given, str):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise InvalidInput(f"{option} is a name or {article} {kind.__name__}, got {given!r:.60}")
    if given not in published:
        raise UnknownName(what, given, published)
    return published[given]
