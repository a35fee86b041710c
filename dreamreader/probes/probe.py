"""Probe: a trained classifier or regressor of a site's activations, and what it was trained on."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.artifacts import Artifact
from dreamreader.edits.mlp import Mlp
from dreamreader.engine import same
from dreamreader.errors import InvalidInput
from dreamreader.probes.card import Card
from dreamreader.probes.labels import Task
from dreamreader.probes.rows import Recorded, rows_of
from dreamreader.probes.scores import probabilities

if TYPE_CHECKING:
    from dreamreader.edits import ProbeGuidance


@dataclass(frozen=True, eq=False)
class Probe(Artifact, kind="probe"):
    """Reads labels or numbers from the activations of one site.

    Attributes:
        mlps: one MLP for all steps, or one for each; on raw activations.
        task: what it tells. loss: `softmax` within each attribute, or `sigmoid`.
        temperature: by which logits are divided before they become probabilities, for each
            MLP and attribute.
        site, branch: where its rows came from, None where they had no name.
        pool: how tokens become rows: `mean`, `token` or `flat`.
        card: what it was trained on, and how it was measured.
    """

    mlps: tuple[Mlp, ...]
    task: Task
    loss: str
    temperature: Float[Tensor, "count attributes"]
    site: str | None
    branch: str | None
    pool: str
    card: Card

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the logits."""
        return self.task.labels

    @property
    def width(self) -> int:
        """Features that it reads."""
        return self.mlps[0].width

    @property
    def steps(self) -> tuple[int, ...]:
        """The step of each MLP; () where one serves all."""
        return tuple(step for each in self.mlps for step in each.steps or ())

    @property
    def noise_conditioned(self) -> bool:
        """Whether its logits depend on the share of the trajectory done."""
        return self.mlps[0].noise is not None

    @property
    def hears_noise(self) -> bool:
        """The earlier name of `noise_conditioned`."""
        return self.noise_conditioned

    def at(self, step: int | None) -> Mlp:
        """The MLP of a step, or the one for all.

        Raises:
            InvalidInput: it has one for each step, and none for this.
        """
        return self.mlps[self._number(step)]

    def temperature_at(self, step: int | None) -> Float[Tensor, " attributes"]:
        """The temperature of each attribute at a step."""
        return self.temperature[self._number(step)]

    def logits(
        self, x: Recorded, *, step: int | None = None, fraction: Tensor | float | None = None
    ) -> Float[Tensor, "*rows outputs"]:
        """The logits, or the numbers of a regression; differentiable in a tensor x.

        Args:
            x: raw rows [..., features] (for the pool `flat` all tokens side by side); or a
                recording of its site, which brings its steps: then [rows, steps, outputs], for the
                pool `token` [rows, steps, tokens, outputs], NaN at padding.
            step: of a tensor's rows, where the probe has an MLP for each.
            fraction: share of the trajectory done, where it is conditioned on the noise level; a
                number, or a tensor that broadcasts to the rows.

        Raises:
            InvalidInput: another width or site, a step that it has not, or a step or fraction that
                is not given.
        """
        if not isinstance(x, Tensor):
            found = self._evaluate_recording(
                x, lambda each, step, f: self.logits(each, step=step, fraction=f)
            )
            return found if self.pool == "token" else found.squeeze(2)
        if x.shape[-1] != self.width:
            raise InvalidInput(
                f"{self._name}: it reads {self.width} features, x is {list(x.shape)}"
            )
        if self.noise_conditioned and fraction is None:
            raise InvalidInput(
                f"{self._name}: it is conditioned on the noise level; give fraction="
            )
        return _on(self.at(step), x.device).logits(x, fraction)

    def probabilities(
        self, x: Recorded, *, step: int | None = None, fraction: Tensor | float | None = None
    ) -> Float[Tensor, "*rows outputs"]:
        """Calibrated probabilities: softmax or sigmoid of logits / temperature.

        Args:
            x, step, fraction: as in `logits`.

        Raises:
            InvalidInput: as `logits`, or the task is `regress`.
        """
        if self.task.kind == "regress":
            raise InvalidInput(f"{self._name}: a regression has no probabilities")
        found = self.logits(x, step=step, fraction=fraction)
        if isinstance(x, Tensor):
            return probabilities(found, self.task, self.loss, self.temperature_at(step))
        steps = rows_of(x, self.pool).steps or (None,)
        each = [
            probabilities(found[:, n], self.task, self.loss, self.temperature_at(at))
            for n, at in enumerate(steps)
        ]
        return torch.stack(each, 1)

    def predict(
        self, x: Recorded, *, step: int | None = None, fraction: Tensor | float | None = None
    ) -> Any:
        """Names of the likeliest class, nested like the rows; by attribute where there are several.

        Of a multilabel task the set of labels of each row; of a regression the numbers. None, or
        NaN, at padding.

        Args:
            x, step, fraction: as in `logits`.
        """
        found = self.logits(x, step=step, fraction=fraction)
        if self.task.kind == "regress":
            return found
        if self.task.kind == "multilabel":
            return _name_entries(found.tolist(), self._set)
        predicted = {}
        for attribute, part in self.task.parts.items():
            own, names = found[..., part], self.task.classes[attribute]
            likeliest = torch.where(own.isnan().any(-1), len(names), own.argmax(-1))
            predicted[attribute] = _name_entries(likeliest.tolist(), (*names, None).__getitem__)
        return predicted[""] if list(predicted) == [""] else predicted

    def guidance(
        self, target: Any = None, avoid: Any = None, alpha: Any = 1.0, **fields: Any
    ) -> "ProbeGuidance":
        """The edit that moves activations toward labels, and away from others, by its gradient.

        Args:
            target, avoid: names of labels, one set for all rows or one for each.
            alpha: strength, one number or one for each row.
            fields: of `ProbeGuidance`: `iterations`, `gamma`, `trust`, `steps`, `rows`, ...; `site`
                and `branch` are those of the probe unless given.
        """
        from dreamreader import edits

        fields = {"pool": self.pool, "branch": self.branch, **fields}
        site = fields.pop("site", self.site)
        if site is None:
            raise InvalidInput(f"{self._name}: it was trained on rows without a site; give site=")
        probe = self.mlps if self.steps else self.mlps[0]
        return edits.ProbeGuidance(site, probe, target, avoid, alpha, **fields)

    @property
    def sites(self) -> tuple[str, ...]:
        """The site that it reads, where it is known."""
        return () if self.site is None else (self.site,)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights as tensors, the card as plain values.

        `weight.0`, `bias.0`, ... are stacked over the steps, [count, outputs, inputs]; `noise`
        and `temperature` beside them.
        """
        tensors: dict[str, Tensor] = {"temperature": self.temperature}
        for name in ("weight", "bias"):
            kind = "weights" if name == "weight" else "biases"
            layers = zip(*(getattr(each, kind) for each in self.mlps), strict=True)
            tensors |= {f"{name}.{n}": torch.stack(each) for n, each in enumerate(layers)}
        noise = [each.noise for each in self.mlps if each.noise is not None]
        if noise:
            tensors["noise"] = torch.stack(noise)
        content = {
            "card": self.card.as_dict(),
            "activation": self.mlps[0].activation,
            "steps": list(self.steps),
            "loss": self.loss,
        }
        return tensors, content

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Self:
        card = Card.of(content["card"])
        classes = {attribute: tuple(names) for attribute, names in card.classes.items()}
        task = Task(card.task, classes)
        depth = sum(name.startswith("weight.") for name in tensors)
        steps, count = content["steps"], len(tensors["weight.0"])
        stacked = {
            name: [tensors[f"{name}.{n}"] for n in range(depth)] for name in ("weight", "bias")
        }
        lengths = {len(each) for layers in stacked.values() for each in layers}
        temperature = tensors["temperature"]
        if lengths != {count} or count != (len(steps) or 1):
            raise InvalidInput(f"weights of {sorted(lengths)} MLPs, {len(steps)} steps")
        if temperature.shape != (count, len(classes)):
            raise InvalidInput(
                f"temperature must be {[count, len(classes)]}, got {list(temperature.shape)}"
            )
        noise = tensors.get("noise")

        def mlp(number: int) -> Mlp:
            weights, biases = (
                tuple(each[number].clone() for each in layers) for layers in stacked.values()
            )
            return Mlp(
                weights,
                biases,
                content["activation"],
                task.labels,
                (steps[number],) if steps else None,
                None if noise is None else noise[number].clone(),
            )

        mlps = tuple(mlp(number) for number in range(count))
        return cls(
            mlps, task, content["loss"], temperature, card.site, card.branch, card.pool, card
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Probe):
            return NotImplemented
        return all(same(getattr(self, e.name), getattr(other, e.name)) for e in fields(self))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        kinds = f"{len(self.steps)} steps" if self.steps else self.card.per_step
        return f"{self._name}, {kinds}, {self.task.kind} {', '.join(self.labels)}"

    @property
    def _name(self) -> str:
        return f"Probe of {self.site or 'activations'}"

    def _number(self, step: int | None) -> int:
        if not self.steps:
            return 0
        if step is None:
            raise InvalidInput(f"{self._name}: it has an MLP for each step; give step=")
        if step not in self.steps:
            had = ", ".join(map(str, self.steps))
            raise InvalidInput(f"{self._name}: it has none for step {step}; trained at {had}")
        return self.steps.index(step)

    def _evaluate_recording(self, recorded: Recorded, read: Any) -> Tensor:
        """[rows, steps, tokens, outputs] of a recording."""
        rows = rows_of(recorded, self.pool)
        if rows.site is not None and self.site is not None and rows.site != self.site:
            raise InvalidInput(f"{self._name}: the rows are of {rows.site}")
        steps = rows.steps or (None,)
        each = [
            read(rows.values[:, n], at, rows.fractions[n] if self.noise_conditioned else None)
            for n, at in enumerate(steps)
        ]
        found = torch.stack(each, 1)
        real = rows.real
        return found if real is None else torch.where(real[..., None], found, torch.nan)

    def _set(self, logits: list[float]) -> set[str] | None:
        if any(map(math.isnan, logits)):
            return None
        return {name for name, each in zip(self.labels, logits, strict=True) if each > 0}


def save(path: str | os.PathLike[str], probe: Probe) -> None:
    """Writes a probe to a file, see `Probe.save`."""
    probe.save(path)


def load(path: str | os.PathLike[str]) -> Probe:
    """The probe of a file, see `Probe.load`."""
    return Probe.load(path)


def _name_entries(values: Any, name: Any) -> Any:
    """A nest of lists with its innermost entries named."""
    if isinstance(values, list) and not (values and isinstance(values[0], float)):
        return [_name_entries(each, name) for each in values]
    return name(values)


def _on(mlp: Mlp, device: torch.device) -> Mlp:
    """The MLP with its weights on a device."""
    if mlp.weights[0].device == device:
        return mlp
    weights, biases = (tuple(e.to(device) for e in each) for each in (mlp.weights, mlp.biases))
    noise = None if mlp.noise is None else mlp.noise.to(device)
    return replace(mlp, weights=weights, biases=biases, noise=noise)
