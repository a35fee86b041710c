"""Where two nested values differ, in words that a person can follow."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

Difference = tuple[str, Any, Any]


def differences(a: Any, b: Any, at: str = "") -> Iterator[Difference]:
    """Places where two nested values differ, with both values; None where one has nothing."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys([*a, *b]):
            inner = f"{at}.{key}" if at else str(key)
            yield from differences(a.get(key), b.get(key), inner)
    elif json.dumps(a, sort_keys=True, default=str) != json.dumps(b, sort_keys=True, default=str):
        yield at, a, b


def first_difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs first between two fingerprints, apart from the machine."""
    skipped = ("digest", "machine")
    left, right = ({k: v for k, v in each.items() if k not in skipped} for each in (earlier, now))
    name, old, new = next(differences(left, right), ("content", "?", "?"))
    return f"{name} was {old}, is {new}"
