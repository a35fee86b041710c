"""Maps that depend on the time of a call: one for each step, or one with its noise as an input."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from dreamreader.errors import InvalidInput
from dreamreader.mapping.base import ActivationMap, CastTensors, check_shape
from dreamreader.mapping.checks import as_tensor, check_whole
from dreamreader.recording.levels import check_level


@dataclass(frozen=True, eq=False, repr=False)
class StepMaps(ActivationMap, form="steps"):
    """A map for each step of the target's scheduler.

    Attributes:
        maps: one for each step. steps: their numbers.
        levels: ratio of noise to signal at each; () where not known.

    Raises:
        InvalidInput: numbers are not as many, or the maps lead between other widths.
    """

    maps: Sequence[ActivationMap]
    steps: Sequence[int]
    levels: Sequence[float] = ()

    def __post_init__(self):
        super().__post_init__()
        steps = tuple(check_whole("StepMaps: a step", each) for each in self.steps)
        for name, value in (("maps", tuple(self.maps)), ("steps", steps)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "levels", tuple(map(float, self.levels)))
        count = len(self.maps)
        whole = count and len(set(self.steps)) == count and len(self.levels) in (0, count)
        if not whole:
            raise InvalidInput(
                f"StepMaps: a map for each step is needed, got {count} maps, steps {self.steps} "
                f"and {len(self.levels)} levels"
            )
        widths = {(each.d_source, each.d_target) for each in self.maps}
        if widths != {(self.d_source, self.maps[0].d_target)}:
            raise InvalidInput(f"StepMaps: maps of equal widths are needed, got {sorted(widths)}")

    @property
    def d_target(self) -> int:
        return self.maps[0].d_target

    def at(self, step: int | None = None, level: float | None = None) -> ActivationMap:
        """The map of the nearest noise level, where it is known here and there; else of the step.

        Steps of schedules of other lengths have one number and another noise.

        Raises:
            InvalidInput: neither is given, it has no such step, or the level lies further beyond
                its levels than they are apart there.
        """
        if level is not None and self._by_level(step, level):
            return self.maps[self._nearest(check_level(self.name, level))]
        if step is not None:
            step = check_whole(f"{self.name}: step", step)
            if step not in self.steps:
                had = ", ".join(map(str, self.steps))
                raise InvalidInput(f"{self.name}: it has no map for step {step}, but for {had}")
            return self.maps[self.steps.index(step)]
        raise InvalidInput(f"{self.name}: it has a map for each step; give step= or level=")

    def apply(
        self,
        x: Float[Tensor, "*batch d_source"],
        *,
        step: int | Tensor | None = None,
        level: float | Tensor | None = None,
    ) -> Float[Tensor, "*batch d_target"]:
        self.check(x)
        by_level = self._by_level(step, level)
        given = level if by_level else step
        if not isinstance(given, Tensor) or given.dim() == 0:
            return self._at(step, level).apply(x)
        if given.shape != x.shape[:1]:
            raise InvalidInput(
                f"{self.name}: steps and levels are one for all or [{len(x)}], got "
                f"{list(given.shape)}"
            )
        found = x.new_empty(*x.shape[:-1], self.d_target)
        for value in given.unique().tolist():
            own = given == value
            which = (None, value) if by_level else (value, None)
            found[own] = self._at(*which).apply(x[own])
        return found

    def direction(
        self,
        v: Float[Tensor, "*batch d_source"],
        at: Float[Tensor, "*place d_source"] | None = None,
        alpha: float = 1.0,
        *,
        step: int | Tensor | None = None,
        level: float | Tensor | None = None,
    ) -> Float[Tensor, "*batch d_target"]:
        """That of the map of one step, around the mean of this step."""
        given = level if self._by_level(step, level) else step
        if isinstance(given, Tensor) and given.dim():
            raise InvalidInput(f"{self.name}: a direction is of one step, got {list(given.shape)}")
        return self._at(step, level).direction(v, at, alpha)

    def inverse(self) -> "StepMaps":
        """The inverse of each."""
        maps = [each.inverse() for each in self.maps]
        mean = torch.stack([each.source_mean for each in maps]).mean(0)
        return StepMaps(mean, maps, self.steps, self.levels, card=self.card.inverted())

    def _at(self, step: int | Tensor | None, level: float | Tensor | None) -> ActivationMap:
        number = None if step is None else check_whole(f"{self.name}: step", step)
        return self.at(number, None if level is None else check_level(self.name, level))

    def _by_level(self, step: Any, level: Any) -> bool:
        return level is not None and (bool(self.levels) or step is None)

    def _nearest(self, level: float) -> int:
        if not self.levels:
            raise InvalidInput(f"{self.name}: the noise levels of its steps are not known")
        known, wanted = [log_level(each) for each in self.levels], log_level(level)
        away = [0.0 if each == wanted else abs(each - wanted) for each in known]
        number = min(range(len(known)), key=away.__getitem__)
        gaps = [abs(each - known[number]) for each in known if each != known[number]]
        if away[number] > min((each for each in gaps if each < math.inf), default=1e-3):
            shown = ", ".join(f"{each:.4g}" for each in self.levels)
            raise InvalidInput(
                f"{self.name}: it has no map near noise level {level:.4g}, but for {shown}"
            )
        return number


@dataclass(frozen=True, eq=False, repr=False)
class NoiseConditionedMap(ActivationMap, form="noise"):
    """An affine map whose coefficients are polynomials of the noise.

    Formula: y = sum over p = 0 .. degree of s^p (W_p x + b_p), with
        s = (log level - centre) / scale, held between -1 and 1: level is the ratio of noise to
        signal, so that log SNR = -2 log level, and s goes over the levels of the fit.

    Attributes:
        weight: W [degree + 1, d_target, d_source]. bias: b [degree + 1, d_target].
        centre, scale: of log level.
    """

    weight: Float[Tensor, "terms d_target d_source"]
    bias: Float[Tensor, "terms d_target"]
    centre: float
    scale: float
    _cast: CastTensors = field(default_factory=CastTensors, init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        check_shape("NoiseConditionedMap", "source_mean", self.source_mean, len(self.source_mean))
        terms, out = self.weight.shape[:2] if self.weight.dim() == 3 else (1, 1)
        check_shape("NoiseConditionedMap", "weight", self.weight, terms, out, self.d_source)
        check_shape("NoiseConditionedMap", "bias", self.bias, terms, out)

    @property
    def d_target(self) -> int:
        return self.weight.shape[1]

    @property
    def degree(self) -> int:
        """Highest power of the noise."""
        return len(self.weight) - 1

    def apply(
        self,
        x: Float[Tensor, "*batch d_source"],
        *,
        step: int | Tensor | None = None,
        level: float | Tensor | None = None,
    ) -> Float[Tensor, "*batch d_target"]:
        self.check(x)
        if level is None:
            raise InvalidInput(f"{self.name}: it depends on the noise; give level=")
        powers = noise_powers(level, self.centre, self.scale, self.degree)
        powers = powers.to(x.device, torch.promote_types(x.dtype, torch.float32))
        if powers.dim() == 1:
            weight = self._cast.get("weight", self.weight, powers)
            bias = powers @ self._cast.get("bias", self.bias, powers)
            return linear(x, torch.tensordot(powers, weight, 1).to(x), bias.to(x))
        if powers.shape[:-1] != x.shape[:1]:
            raise InvalidInput(
                f"{self.name}: levels are one for all or [{len(x)}], got {list(powers.shape[:-1])}"
            )
        weight = self._cast.get("weight", self.weight, x)
        bias = self._cast.get("bias", self.bias, x)
        found = powers.new_zeros(*x.shape[:-1], self.d_target)
        for p in range(len(weight)):
            share = powers[:, p].reshape(-1, *[1] * (x.dim() - 1))
            found = found + share * linear(x, weight[p], bias[p])
        return found.to(x.dtype)


def log_level(level: float) -> float:
    """The logarithm of a ratio of noise to signal; infinite at pure noise and at none."""
    return math.log(level) if level > 0 else -math.inf


def noise_powers(
    level: float | Tensor, centre: float, scale: float, degree: int
) -> Float[Tensor, "*batch terms"]:
    """s^0 .. s^degree of noise levels, float64; see `NoiseConditionedMap`.

    Raises:
        InvalidInput: a level is NaN or below 0.
    """
    levels = as_tensor("noise levels", level).double()
    if not bool((levels >= 0).all()):
        raise InvalidInput(f"noise levels are ratios of noise to signal from 0, got {level}")
    s = ((levels.log() - centre) / scale).clamp(-1, 1)
    return s.unsqueeze(-1) ** torch.arange(degree + 1, device=s.device)
