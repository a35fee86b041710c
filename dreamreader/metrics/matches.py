"""Whether generated text has a form."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dreamreader.errors import InvalidInput
from dreamreader.metrics.base import Column, Outputs, require_field


@dataclass(frozen=True)
class Matches:
    """Whether a regular expression, or a text of each row, is found in what was generated.

    Args:
        pattern: as Python's `re` has it, for all rows.
        column: of the rows instead, such as "answer": each row's own text, as it stands. Rows
            without it have no value.
        ignore_case: whether small and capital letters are the same.

    Raises:
        InvalidInput: not one of both is given, or the pattern is no regular expression.
    """

    pattern: str | None = None
    column: str | None = None
    ignore_case: bool = False

    name: ClassVar[str] = "matches"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.pattern is None) == (self.column is None):
            raise InvalidInput(
                "matches: give one of pattern, a regular expression, and column, of each row's text"
            )
        if not isinstance(self.ignore_case, bool):
            raise InvalidInput(f"matches: ignore_case is true or false, got {self.ignore_case!r}")
        if self.column is not None:
            if not (isinstance(self.column, str) and self.column):
                raise InvalidInput(
                    f"matches: column is a name, such as answer, got {self.column!r}"
                )
            return
        try:
            re.compile(self.pattern)  # pyright: ignore[reportCallIssue, reportArgumentType]
        except (re.error, TypeError) as error:
            raise InvalidInput(
                f"matches: pattern {self.pattern!r} is no regular expression: {error}"
            ) from error

    def measure(self, got: Outputs, reference: Outputs | None = None) -> dict[str, Column]:
        texts = require_field(self.name, "text", got)
        pattern = self.pattern
        if pattern is not None:
            flags = re.IGNORECASE if self.ignore_case else 0
            return {self.name: [re.search(pattern, each, flags) is not None for each in texts]}
        same = str.lower if self.ignore_case else str
        own = ["" if each is None else str(each) for each in got.column(str(self.column))]
        found = zip(own, texts, strict=True)
        return {self.name: [same(one) in same(text) if one else None for one, text in found]}

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuse rows of which none has a text in the column, such as one spelled wrong.

        Raises:
            InvalidInput: says which column was looked for.
        """
        if self.column is None:
            return
        found = [row.get(self.column) for row in rows]
        if not any(isinstance(each, str) and each for each in found):
            raise InvalidInput(f"matches: no row has a text in the column {self.column!r}")
