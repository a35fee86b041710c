"""A plain function as a metric."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.metrics.base import Column, Outputs, require_field


@dataclass(frozen=True)
class FunctionMetric:
    """Calls a function and checks that it gives one value for each row.

    Args:
        fn: `fn(got)`, or `fn(got, reference)` where it compares; gives values, or a mapping from
            columns to values.
    """

    name: str
    fn: Callable[..., Any]
    needs: frozenset[str]
    compares: bool = False

    def measure(self, got: Outputs, reference: Outputs | None) -> dict[str, Column]:
        given = [got, reference] if self.compares else [got]
        for outputs in given:
            for each in sorted(self.needs):
                require_field(self.name, each, outputs)
        found = self.fn(*given)
        columns = found if isinstance(found, Mapping) else {self.name: found}
        return {
            str(name): self._check_column(name, each, len(got.rows))
            for name, each in columns.items()
        }

    def _check_column(self, name: Any, values: Any, count: int) -> Column:
        listed = values.tolist() if isinstance(values, Tensor) else values
        if isinstance(listed, str) or not isinstance(listed, Sequence):
            kind = type(values).__name__
            raise InvalidInput(f"metric {self.name}: {name} is {kind}, not one value for each row")
        if len(listed) != count:
            raise InvalidInput(
                f"metric {self.name}: {name} has {len(listed)} values for {count} rows"
            )
        for each in listed:
            if each is not None and not isinstance(each, float | int | str):
                raise InvalidInput(
                    f"metric {self.name}: {name} holds {type(each).__name__}; a value is a number, "
                    "truth value, text or None"
                )
        return list(listed)
