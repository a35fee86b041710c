"""Where two nested values differ, in words that a person can follow."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class JobDifference:
    """What differs between two folders of one kind of job.

    Attributes:
        spec, machine: (field, in the first, in the second).
        fingerprint: differences of weights, code, packages and seeds.
        results: of what was found.
    """

    spec: list[Difference]
    fingerprint: list[Difference]
    machine: list[Difference]
    results: list[Difference]

    @property
    def is_same(self) -> bool:
        """Whether they are equal but for the machine."""
        return not (self.spec or self.fingerprint or self.results)

    @property
    def lines(self) -> list[str]:
        """What there is to say beside the lists."""
        return []
