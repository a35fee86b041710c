"""Which latents stay active: small objects that an autoencoder carries and files name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dreamreader.errors import InvalidInput, UnknownName

SCORES = ("l2", "l2_squared", "entropy", "entropy_low", "leverage", "uniform")
RULES = ("top", "sampled")


@dataclass(frozen=True)
class TopK:
    """Keeps the k largest positive pre-activations of each row.

    Attributes:
        k: a whole number, at least 1.

    Raises:
        InvalidInput: k cannot be right.

    Reference:
        Gao et al., Scaling and evaluating sparse autoencoders, arXiv:2406.04093.
    """

    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, float) and self.k.is_integer():
            object.__setattr__(self, "k", int(self.k))
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise InvalidInput(f"TopK: k is a whole number, at least 1, got {self.k!r}")


@dataclass(frozen=True)
class BatchTopK:
    """Keeps the round(k n) largest positive pre-activations of all n rows together.

    Attributes:
        k: mean number for a row; need not be whole.

    Raises:
        InvalidInput: k is not positive and finite.

    Reference:
        Bussmann et al., BatchTopK sparse autoencoders, arXiv:2412.06410.
    """

    k: float

    def __post_init__(self) -> None:
        _check_positive("BatchTopK", "k", self.k)

    def budget(self, rows: int) -> int:
        """How many entries of so many rows are kept."""
        return round(self.k * rows)


@dataclass(frozen=True)
class SampledTopK:
    """Chooses round(k l) columns of a batch by a score, and keeps as BatchTopK does among them.

    With l = 1 each of the k columns keeps all that is positive in it; with k l at least the width
    it is BatchTopK to the bit.

    Attributes:
        k: mean number of active latents in a row.
        l: columns of the pool for each active latent, a real number.
        score: of a column of activations: `l2`, `l2_squared`, `entropy` (wide use wins),
            `entropy_low` (narrow use wins), `leverage` (ridge, 0.01) or `uniform`.
        rule: the `top` columns, or `sampled` in proportion to the score.
        update_every: steps for which a pool is kept.
        seed: of what is drawn, together with the step.

    Raises:
        InvalidInput, UnknownName: a value cannot be right.

    Reference:
        Sampled sparse autoencoders, arXiv:2508.21324.
    """

    k: float
    l: float = 1.5  # noqa: E741  the paper's name
    score: str = "l2"
    rule: str = "top"
    update_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_positive("SampledTopK", "k", self.k)
        _check_positive("SampledTopK", "l", self.l)
        if self.score not in SCORES:
            raise UnknownName("score of SampledTopK", str(self.score), SCORES)
        if self.rule not in RULES:
            raise UnknownName("rule of SampledTopK", str(self.rule), RULES)
        for name, least in (("update_every", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInput(f"SampledTopK: {name} is at least {least}, got {value!r}")

    def budget(self, rows: int) -> int:
        """How many entries of so many rows are kept."""
        return round(self.k * rows)

    def pool_size(self, d_sae: int) -> int:
        """How many columns take part; at least 1."""
        return min(max(1, round(self.k * self.l)), d_sae)


@dataclass(frozen=True)
class JumpReLU:
    """Keeps what is above the threshold of its latent; with thresholds of 0 it is ReLU.

    Without `sparsity` thresholds stay as they are in training. With it they learn, by
    straight-through gradients of a rectangle around them, and the loss has in addition

    Formula: sparsity * min(1, (step + 1) / warmup) * mean over rows of the active latents.

    Attributes:
        sparsity: weight of an active latent; None where thresholds do not learn.
        bandwidth: width of the rectangle, in pre-activations.
        start: thresholds before the first step. warmup: steps in which the weight rises.

    Raises:
        InvalidInput: a value cannot be right.

    Reference:
        Rajamanoharan et al., Jumping ahead, arXiv:2407.14435.
    """

    sparsity: float | None = None
    bandwidth: float = 0.001
    start: float = 0.001
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            _check_positive("JumpReLU", "sparsity", self.sparsity)
        for name in ("bandwidth", "start"):
            _check_positive("JumpReLU", name, getattr(self, name))
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 0:
            raise InvalidInput(f"JumpReLU: warmup is a number of steps, got {self.warmup!r}")

    def weight(self, step: int) -> float:
        """Of an active latent at a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return (self.sparsity or 0.0) * rise


Selection = TopK | BatchTopK | SampledTopK | JumpReLU
SELECTIONS = {each.__name__: each for each in (TopK, BatchTopK, SampledTopK, JumpReLU)}


def describe_selection(selection: Selection) -> dict[str, Any]:
    """A selection as plain values, for `selection_from`."""
    own = {each.name: getattr(selection, each.name) for each in fields(selection)}
    return {"name": type(selection).__name__, **own}


def selection_from(values: Mapping[str, Any]) -> Selection:
    """The selection that `describe_selection` described.

    Args:
        values: `name` and the attributes of its class.

    Raises:
        InvalidInput, UnknownName: there is none of this name, or it has no such attribute.

    Example:
        >>> selection_from({"name": "TopK", "k": 32})
        TopK(k=32)
    """
    own = dict(values)
    name = own.pop("name", None)
    if name not in SELECTIONS:
        raise UnknownName("selection", str(name), SELECTIONS)
    try:
        return SELECTIONS[name](**own)
    except TypeError as error:
        known = ", ".join(each.name for each in fields(SELECTIONS[name])) or "nothing"
        raise InvalidInput(f"selection {name} takes {known}, got {', '.join(own)}") from error


def check_selection(selection: Any, d_sae: int) -> None:
    """Refuses what is no selection, or asks for more latents than there are.

    Raises:
        InvalidInput: says which.
    """
    if not isinstance(selection, Selection):
        raise InvalidInput(
            f"selection is one of {', '.join(SELECTIONS)}, such as TopK(32), got {selection!r:.60}"
        )
    k = getattr(selection, "k", 0)
    if k > d_sae:
        raise InvalidInput(f"{selection}: k is at most d_sae, which is {d_sae}")


def _check_positive(what: str, name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value > 0 and math.isfinite(value)):
        raise InvalidInput(f"{what}: {name} is a positive number, got {value!r}")
