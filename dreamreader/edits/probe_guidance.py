"""ProbeGuidance: moves activations along the gradient of a probe's logits (K-steering)."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dreamreader.edits.base import check_finite, per_site, row_length
from dreamreader.edits.labels import coefficients, label_sets
from dreamreader.edits.mlp import Mlp, at_step, mlps
from dreamreader.engine import EditContext, EditRequest
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops.guide import descend, guide

POOLS = ("token", "mean", "flat")

Labels = str | int | Collection[Any] | None
Logits = Callable[[Tensor], Tensor]
Probe = Mlp | Sequence[Mlp] | Logits


@dataclass(frozen=True, eq=False)
class ProbeGuidance(EditRequest):
    """Moves every selected token towards the labels of `target` and away from those of `avoid`.

    Formula: h <- h - alpha gamma^t grad_h (mean of the logits to avoid - mean of those to reach),
    t = 0 .. iterations - 1; both means over labels, each row for itself.

    Args:
        site: site string or several.
        probe: an `Mlp`; a sequence of these for the steps of denoising; a function that gives
            logits [rows, ..., labels] for activations [rows, tokens, features] in float32, for
            which autograd runs and which sees no padding; or a mapping from site names to these.
        target: labels to reach, by name or index: one label or a set of labels for all rows, or a
            list with one entry (a label, a collection of labels or None) for each row of the run.
        avoid: labels to move away from, in the same forms.
        alpha: strength, one number or one for each row of the run.
        gamma: factor of the strength from one inner step to the next.
        iterations: number of inner steps.
        trust: largest norm of the whole change, as a multiple of the norm of what is moved.
        pool: what the probe reads. `token`: every token for itself. `mean`: the mean of the
            selected tokens, which all take the same change. `flat`: all tokens as one row
            [tokens * features].
        schedule: a factor of alpha for each step of denoising.

    Raises:
        InvalidInput: values that are not finite, no label, a label out of range or both to reach
            and to avoid; at the run, a probe for another width or without the running step.
        UnknownName: a label that the probe does not have, or a kind of pool.

    Example:
        >>> probe = Mlp([torch.eye(2)], [torch.zeros(2)], labels=("red", "blue"))
        >>> ProbeGuidance("unet.mid_block", probe, target=["red", "blue"]).row_lengths()
        {'target': 2}

    Reference:
        Beyond Linear Steering: Unified Multi-Attribute Control for Language Models (2505.24535).
    """

    probe: Probe | Mapping[str, Probe]
    target: Labels = None
    avoid: Labels = None
    alpha: float | Sequence[float] | Tensor = 1.0
    gamma: float = field(default=1.0, kw_only=True)
    iterations: int = field(default=1, kw_only=True)
    trust: float | None = field(default=None, kw_only=True)
    pool: str = field(default="token", kw_only=True)
    schedule: Sequence[float] | None = field(default=None, kw_only=True)

    is_function = True

    def __post_init__(self):
        super().__post_init__()
        if self.pool not in POOLS:
            raise UnknownName("pool of ProbeGuidance", self.pool, POOLS)
        if self.pool == "flat" and self.tokens is not None:
            raise InvalidInput(
                "ProbeGuidance: pool 'flat' moves the whole site, it takes no tokens"
            )
        self._check_numbers()
        self._check_probe()
        sets = [label_sets(each) for each in (self.target, self.avoid)]
        if not any(labels for rows in sets for labels in rows):
            raise InvalidInput("ProbeGuidance: give labels as target, as avoid, or as both")
        for probe in mlps(self.probe):
            for labels in (labels for rows in sets for labels in rows):
                coefficients([labels], [()], probe.labels, len(probe))

    @property
    def selects(self) -> bool:
        return True

    @property
    def changes_with_step(self) -> bool:
        if self.schedule is not None or any(each.changes_with_step for each in mlps(self.probe)):
            return True
        values = self.probe.values() if isinstance(self.probe, Mapping) else [self.probe]
        return any(isinstance(each, Sequence) for each in values)

    def row_lengths(self) -> dict[str, int]:
        found = row_length("alpha", self.alpha)
        for name in ("target", "avoid"):
            found |= row_length(name, getattr(self, name))
        return found

    def touched(self, place: EditContext) -> Tensor:
        return self._strength(place)

    def check(self, place: EditContext) -> None:
        """Refuse a probe for another width, and a row without labels that would be moved."""
        flat = self.pool == "flat"
        if flat and bool((place.selected != place.selected[:, :1]).any()):
            raise InvalidInput(
                f"ProbeGuidance at {place.site}: pool 'flat' needs all tokens, some are left out"
            )
        probe, width = self._probe(place), place.width * (place.tokens if flat else 1)
        if isinstance(probe, Mlp):
            if probe.width != width:
                whole = f" in its {place.tokens} tokens" if flat else ""
                raise InvalidInput(
                    f"ProbeGuidance at {place.site}: the probe reads {probe.width} features, the "
                    f"site has {width}{whole}"
                )
            self._coefficients(place, probe.labels, len(probe))
        targets, avoids = self._sets(place)
        moved = (self._strength(place) != 0).any(1).expand(place.batch)
        moved = moved.reshape(len(place.branches), place.rows, -1).any(2).any(0)  # [rows]
        for row, labels in enumerate(zip(targets, avoids, strict=True)):
            if moved[row] and not any(labels):
                raise InvalidInput(
                    f"ProbeGuidance at {place.site}: row {place.first + row} has neither target "
                    "nor avoid, though its alpha is not 0"
                )

    def apply(self, x: Tensor, place: EditContext) -> Tensor:
        strength = self._strength(place).to(x.device)  # [batch or 1, tokens or 1]
        if self.pool == "token":
            return self._guide_rows(x, strength, place)
        if self.pool == "flat":
            flat = x.flatten(1).unsqueeze(1)
            return self._guide_rows(flat, strength[:, :1], place).reshape(x.shape)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        share = place.selected.to(wide.device, wide.dtype).expand(x.shape[:2]).unsqueeze(-1)
        total = share.sum(1, keepdim=True)  # [batch, 1, 1]
        kept = torch.where(share != 0, share * wide, 0).sum(1, keepdim=True)
        mean = torch.where(total != 0, kept / total, 0)  # [batch, 1, width]
        amount = self._amount(place).to(wide.device).reshape(-1, 1)
        amount = torch.where(total.squeeze(-1) != 0, amount, 0)
        change = self._guide_rows(mean, amount, place) - mean
        moved = (wide + share * change).to(x.dtype)
        return torch.where(strength.unsqueeze(-1) != 0, moved, x)

    def _guide_rows(self, x: Tensor, strength: Tensor, place: EditContext) -> Tensor:
        """Every row of x [batch, rows, features] guided by the probe."""
        probe = self._probe(place)
        trust = torch.inf if self.trust is None else self.trust
        wide = torch.promote_types(x.dtype, torch.float32)
        if not isinstance(probe, Mlp):
            return self._move_by_autograd(probe, x, strength.to(wide), place, trust)
        fraction = None if place.instant is None else place.instant.fraction
        biases = (probe.first_bias(fraction), *probe.biases[1:])
        return guide(
            x,
            [each.to(x.device, wide) for each in probe.weights],
            [each.to(x.device, wide) for each in biases],
            self._coefficients(place, probe.labels, len(probe)).to(x.device),
            strength,
            activation=probe.activation,
            gamma=self.gamma,
            iterations=self.iterations,
            trust=trust,
        )

    def _move_by_autograd(
        self, logits: Logits, x: Tensor, strength: Tensor, place: EditContext, trust: float
    ) -> Tensor:
        """The same for any function, which may look at several tokens: none of them is padding."""
        own = place.own
        if own is None or x.shape[1] != place.tokens or not bool((own < 0).any()):
            return self._descend(logits, x, strength, place, trust, slice(None))
        y, strength = x.clone(), strength.expand(x.shape[:2])
        for entry, real in enumerate((own >= 0).to(x.device)):
            at = slice(entry, entry + 1)
            part, amount = x[at][:, real], strength[at][:, real]
            y[entry, real] = self._descend(logits, part, amount, place, trust, at)[0]
        return y

    def _descend(
        self,
        logits: Logits,
        x: Tensor,
        strength: Tensor,
        place: EditContext,
        trust: float,
        at: slice,
    ) -> Tensor:
        """Some entries of the batch; the graph lives only here, unless x itself has one."""
        graph = torch.is_grad_enabled() and x.requires_grad

        def gradient(h: Tensor) -> Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                h = h if graph else h.detach().clone().requires_grad_()
                z = logits(h)
                _check_logits(z, h, place)
                c = self._coefficients(place, (), z.shape[-1])[at].to(z)
                c = c.reshape(len(c), *[1] * (z.dim() - 2), -1)  # [batch, 1 .., labels]
                return torch.autograd.grad((c * z).sum(), h, create_graph=graph)[0]

        h0 = x.to(strength.dtype)
        h = descend(h0, strength.unsqueeze(-1), self.gamma, self.iterations, trust, gradient)
        return torch.where(strength.unsqueeze(-1) != 0, h.to(x.dtype), x)

    def _probe(self, place: EditContext) -> Mlp | Logits:
        probe = per_site(self.probe, place.site, "ProbeGuidance: probe")  # pyright: ignore
        return at_step(probe, place) if isinstance(probe, Mlp | Sequence) else probe

    def _coefficients(self, place: EditContext, labels: Sequence[str], count: int) -> Tensor:
        """[batch, labels]: c of every entry of the batch."""
        c = coefficients(*self._sets(place), labels, count)
        return place.over_batch(c)

    def _sets(self, place: EditContext) -> tuple[list[tuple], list[tuple]]:
        """The labels to reach and to avoid of each row of this call."""
        found = []
        for name in ("target", "avoid"):
            sets = label_sets(getattr(self, name))
            if len(sets) not in (1, place.total):
                raise InvalidInput(
                    f"{name} at {place.site}: has {len(sets)} entries, the run has {place.total} "
                    "rows; a set is one entry for all"
                )
            sets = sets * place.total if len(sets) == 1 else sets
            found.append(sets[place.first : place.first + place.rows])
        return found[0], found[1]

    def _factor(self, place: EditContext) -> float:
        if self.schedule is None:
            return 1.0
        return float(self.schedule[place.step_of(len(self.schedule), "schedule")])

    def _amount(self, place: EditContext) -> Tensor:
        """alpha at the running step, [] or [batch]."""
        return place.per_row(self.alpha, "alpha") * self._factor(place)

    def _strength(self, place: EditContext) -> Tensor:
        """The same times the selection; broadcasts to [batch, tokens]."""
        return place.strength(self.alpha, "alpha") * self._factor(place)

    def _check_numbers(self) -> None:
        for name in ("alpha", "gamma") + (() if self.schedule is None else ("schedule",)):
            check_finite(f"ProbeGuidance: {name}", getattr(self, name))
        if isinstance(self.alpha, Tensor) and self.alpha.requires_grad:
            raise InvalidInput("ProbeGuidance: alpha requires grad, but guidance has none for it")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise InvalidInput(
                f"ProbeGuidance: iterations must be 1 or more, got {self.iterations}"
            )
        if self.trust is not None and not self.trust >= 0:
            raise InvalidInput(f"ProbeGuidance: trust must be 0 or more, got {self.trust}")

    def _check_probe(self) -> None:
        values = self.probe.values() if isinstance(self.probe, Mapping) else [self.probe]
        for probe in values:
            several = isinstance(probe, Sequence) and len(probe) > 0
            if several and all(isinstance(each, Mlp) for each in probe):  # pyright: ignore
                continue
            if isinstance(probe, Mlp) or callable(probe):
                continue
            raise InvalidInput(
                "ProbeGuidance: probe must be an Mlp, a sequence of these for the steps, a "
                f"function or a mapping from sites to these, got {type(probe).__name__}"
            )


def _check_logits(z: Any, h: Tensor, place: EditContext) -> None:
    if not isinstance(z, Tensor) or z.dim() < 2 or z.shape[0] != h.shape[0]:
        got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise InvalidInput(
            f"ProbeGuidance at {place.site}: the probe must give logits "
            f"[{h.shape[0]}, ..., labels] for {list(h.shape)}, got {got}"
        )
