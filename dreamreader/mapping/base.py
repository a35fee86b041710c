"""What every map of activations is: rows of a source's site in, rows of a target's site out."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.artifacts import Artifact, pack, unpack
from dreamreader.engine import same
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.mapping.checks import check_number


@dataclass(frozen=True)
class MapCard:
    """Where a map leads from and to, how it was fitted, and what it reached; plain values.

    Attributes:
        source_model, target_model, source_site, target_site: names; None where not given.
        method: of `fit_map`. settings: what it was fitted with, and what was chosen.
        scores: on held-out rows, see `MapReport.as_dict`.
    """

    source_model: str | None = None
    target_model: str | None = None
    source_site: str | None = None
    target_site: str | None = None
    method: str = "given"
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)

    def inverted(self) -> "MapCard":
        """That of the inverse: from target to source, without scores."""
        return MapCard(
            self.target_model,
            self.source_model,
            self.target_site,
            self.source_site,
            f"inverse of {self.method}",
            self.settings,
        )


_FORMS: "dict[str, type[ActivationMap]]" = {}


@dataclass(frozen=True, eq=False, repr=False)
class ActivationMap(Artifact, kind="map"):
    """Maps activations of a source to those of a target; see its subclasses.

    Attributes:
        source_mean: r [d_source], around which directions are taken unless another place is said.
        card: where it leads from and to, see `MapCard`.
    """

    source_mean: Float[Tensor, " d_source"]
    card: MapCard = field(default=MapCard(), kw_only=True)

    form: ClassVar[str] = ""

    def __init_subclass__(cls, form: str = "", **arguments: Any):
        super().__init_subclass__(**arguments)
        if form:
            cls.form = form
            _FORMS[form] = cls

    def __post_init__(self):
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):  # part of no graph, and of use in any later one
                object.__setattr__(self, each.name, plain_tensor(value))

    @cached_property
    def d_source(self) -> int:
        """Features that it reads."""
        return len(self.source_mean)

    @property
    def d_target(self) -> int:
        """Features that it gives."""
        raise NotImplementedError

    def apply(
        self,
        x: Float[Tensor, "*batch d_source"],
        *,
        step: int | Tensor | None = None,
        level: float | Tensor | None = None,
    ) -> Float[Tensor, "*batch d_target"]:
        """Target activations that belong to source activations, in dtype and device of x.

        Args:
            x: source activations. The weights are cast to its type, as those of a model are.
            step: of the target's scheduler, level: ratio of noise to signal, for maps that depend
                on them; one for all, or one for each entry of dimension 0.

        Raises:
            InvalidInput: x has another width, or the map needs a step or level that is not given.
        """
        raise NotImplementedError

    def direction(
        self,
        v: Float[Tensor, "*batch d_source"],
        at: Float[Tensor, "*place d_source"] | None = None,
        alpha: float = 1.0,
        *,
        step: int | Tensor | None = None,
        level: float | Tensor | None = None,
    ) -> Float[Tensor, "*batch d_target"]:
        """What a step along a source direction is in the target: map(r + alpha v) - map(r).

        The difference leaves out what the map adds to everything; alpha map(v) would not.

        Args:
            v: directions. at: r; the mean of the source by default. alpha: how far.
            step, level: as in `apply`.

        Raises:
            InvalidInput: as `apply`.
        """
        self.check_direction(v, at, alpha)
        place = (self.source_mean if at is None else at).to(v.device, torch.float64)
        place = place.expand(torch.broadcast_shapes(place.shape, v.shape))
        moved = self.apply(place + alpha * v.double(), step=step, level=level)
        return (moved - self.apply(place, step=step, level=level)).to(v.dtype)

    def inverse(self) -> "ActivationMap":
        """The map from target to source that undoes this one.

        Raises:
            InvalidInput: there is none.
        """
        raise InvalidInput(
            f"{self.name}: a map of the form {self.form!r} has no inverse; fit one from the target "
            "to the source"
        )

    @property
    def name(self) -> str:
        """Method and sites, for errors."""
        a = self.card.source_site or "source"
        return f"map {a} -> {self.card.target_site or 'target'} ({self.card.method})"

    @property
    def sites(self) -> tuple[str, ...]:
        """The target's site, where it is known: what it gives belongs there."""
        return () if self.card.target_site is None else (self.card.target_site,)

    def with_card(self, **values: Any) -> Self:
        """The same map with other words on its card."""
        return replace(self, card=replace(self.card, **values))

    def check(self, x: Tensor, what: str = "x") -> None:
        """Refuses what is not [..., d_source].

        Args:
            x: activations. what: they are, for the error.

        Raises:
            InvalidInput: says so where x is as wide as the target.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise InvalidInput(f"{self.name}: {what} must be a floating point tensor, got {kind}")
        if not x.shape or x.shape[-1] != self.d_source:
            back = x.dim() > 0 and x.shape[-1] == self.d_target
            hint = "; that is the width of its target: is it used backwards?" if back else ""
            raise InvalidInput(
                f"{self.name}: {what} must be [..., {self.d_source}], got {list(x.shape)}{hint}"
            )

    def check_direction(self, v: Tensor, at: Tensor | None, alpha: float) -> None:
        """Refuses what `direction` cannot take."""
        self.check(v, "a direction")
        check_number(f"{self.name}: alpha", alpha)
        if at is None:
            return
        self.check(at, "at=")
        try:
            torch.broadcast_shapes(at.shape, v.shape)
        except RuntimeError:
            raise InvalidInput(
                f"{self.name}: directions {list(v.shape)} cannot start at places {list(at.shape)}"
            ) from None

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its tensors under their names, the rest as plain values."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                tensors[each.name] = value
            elif each.init and each.name != "card":
                values[each.name] = value
        own = sorted(tensors)
        card = {each.name: getattr(self.card, each.name) for each in fields(MapCard)}
        content = {"card": pack(card, tensors), "values": pack(values, tensors)}
        return tensors, {"form": self.form, "tensors": own, **content}

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Self:
        form = content["form"]
        if form not in _FORMS:
            raise UnknownName("form of a map", str(form), _FORMS)
        made = _FORMS[form]
        if not issubclass(made, cls):
            raise InvalidInput(f"it holds a map of the form {form!r}, not {cls.form!r}")
        values = {name: tensors[name] for name in content["tensors"]}
        values |= unpack(content["values"], tensors)
        return made(**values, card=MapCard(**unpack(content["card"], tensors)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActivationMap) or type(other) is not type(self):
            return NotImplemented
        names = [each.name for each in fields(self) if each.init]
        return all(same(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        shown = f"{type(self).__name__}: {self.name}, {self.d_source} -> {self.d_target}"
        fvu = self.card.scores.get("fvu")
        return shown if fvu is None else f"{shown}, FVU {fvu:.3f}"


class CastTensors:
    """Copies of tensors in the types and on the devices in which they were asked for."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CastTensors)  # copies are no part of a map's value

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def get(self, name: str, value: Tensor, like: Tensor) -> Tensor:
        """`value` in dtype and device of `like`."""
        if value.dtype == like.dtype and value.device == like.device:
            return value
        key = name, like.device, like.dtype
        if key not in self._known:
            with torch.inference_mode(False):  # it outlives the mode in which it is first asked for
                self._known[key] = value.to(like.device, like.dtype)
        return self._known[key]


def plain_tensor(value: Tensor) -> Tensor:
    """The tensor without its graph; one of inference mode as a copy that a graph may have."""
    with torch.inference_mode(False):
        return value.clone() if value.is_inference() else value.detach()


def check_shape(owner: str, name: str, value: Any, *shape: int) -> None:
    """Refuses a tensor of another shape, or with values that are not finite.

    Raises:
        InvalidInput: names it.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != shape:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise InvalidInput(f"{owner}: {name} must be floating point {list(shape)}, got {got}")
    if not bool(value.isfinite().all()):
        raise InvalidInput(f"{owner}: {name} has values that are not finite")


def check_matrix(owner: str, name: str, value: Any, columns: int) -> None:
    """Refuses what is not [some, columns] and finite."""
    rows = value.shape[0] if isinstance(value, Tensor) and value.dim() == 2 else 0
    check_shape(owner, name, value, rows or 1, columns)
