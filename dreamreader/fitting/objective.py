"""What a training minimises."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Terms = Tensor | Mapping[str, Tensor] | None


class Objective(ABC):
    """A loss, and what errors say of it.

    A function from (module, batch) to a loss, or to parts of one by name, is an objective too; make
    a subclass where errors shall name examples and parts.

    Attributes:
        part_name: what `parts` are called in errors.
    """

    part_name = "part"

    @abstractmethod
    def terms(self, module: Any, batch: Any, /) -> Terms:
        """The loss, or parts of it whose sum is minimised; None: nothing to learn from here."""

    def parts(self, module: Any, /) -> Mapping[str, Iterable[nn.Parameter]]:
        """The parameters by the names that errors use."""
        return {name: [each] for name, each in module.named_parameters()}

    def culprit(self, module: Any, batch: Any, /) -> str:
        """The first part of the loss that is not finite."""
        with torch.no_grad():
            terms = self.terms(module, batch)
        named = terms if isinstance(terms, Mapping) else {}
        return next((name for name, each in named.items() if not bool(each.isfinite())), "none")

    def describe(self, batch: Any, /) -> str:
        """The examples of a batch, for errors, such as `rows 3, 5`; may be empty."""
        return ""

    def metrics(self, module: Any, /) -> Mapping[str, float]:
        """Further numbers of the last batch, for those who watch."""
        return {}

    def identity(self) -> Any:
        """What a training that goes on has to share with the one that was stopped."""
        return vars(self)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Around a training."""
        yield


class Function(Objective):
    """A plain function as an objective."""

    def __init__(self, function: Callable[[Any, Any], Terms]):
        self.function = function

    def terms(self, module: Any, batch: Any, /) -> Terms:
        return self.function(module, batch)
