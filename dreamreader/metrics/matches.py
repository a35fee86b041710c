"""Whether generated text has a form."""

import re
from dataclasses import dataclass
from typing import ClassVar

from dreamreader.errors import InvalidInput
from dreamreader.metrics.base import Column, Outputs, require_field


@dataclass(frozen=True)
class Matches:
    """Whether a regular expression is found in the text that a language model generated.

    Args:
        pattern: as Python's `re` has it.

    Raises:
        InvalidInput: the pattern is no regular expression.
    """

    pattern: str

    name: ClassVar[str] = "matches"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise InvalidInput(
                f"matches: pattern {self.pattern!r} is no regular expression: {error}"
            ) from error

    def measure(self, got: Outputs, reference: Outputs | None = None) -> dict[str, Column]:
        found = require_field(self.name, "text", got)
        return {self.name: [re.search(self.pattern, each) is not None for each in found]}
