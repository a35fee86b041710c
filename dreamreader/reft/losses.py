"""What adapters are trained on: activations of a teacher, and the parts that all losses share."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreamreader.edits import Edit
from dreamreader.engine import EditRequest, Reader
from dreamreader.errors import InvalidInput
from dreamreader.fitting import Objective
from dreamreader.recording.pairs import Pairs
from dreamreader.reft.model import Reft


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples of one step of training.

    Attributes:
        rows, moments: int64 [n], each a row at one of its calls. seed: of what a loss draws.
    """

    rows: Tensor
    moments: Tensor
    seed: int

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


class Loss(Objective):
    """A loss over rows and their calls.

    Attributes:
        rows: examples; validation holds out whole ones. moments: calls of each.
    """

    part_name = "site"
    rows: int
    moments: int

    @abstractmethod
    def terms(self, reft: Reft, batch: Batch, /) -> dict[str, Tensor]:
        """Parts of the loss by name, with graphs to the adapters; their sum is minimised."""

    def parts(self, reft: Reft, /) -> Mapping[str, Iterable[nn.Parameter]]:
        return {site: list(each.parameters()) for site, each in reft.adapters.items()}

    def describe(self, batch: Batch) -> str:
        return f"rows {', '.join(map(str, batch.rows.tolist()))}"

    def identity(self) -> Mapping[str, Any]:
        """All that the loss depends on beside the adapters; a training goes on with the same."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class ModelLoss(Loss):
    """A loss that runs the model, whose own weights get no gradient meanwhile."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self._watching: list[EditRequest] = []

    def identity(self) -> Mapping[str, Any]:
        subject = self.reader.subject
        parts = getattr(subject, "components", {"": subject})
        modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        return {**super().identity(), "reader": modules}

    def culprit(self, reft: Reft, batch: Batch) -> str:
        found: list[str] = []

        def look(x: Tensor, place) -> None:
            if not bool(x.isfinite().all()):
                found.append(place.site)

        self._watching = [Edit(site, look) for site in reft.sites]
        try:
            super().culprit(reft, batch)
        finally:
            self._watching = []
        return found[0] if found else "none, the model itself gives no finite values"

    @contextmanager
    def ready(self) -> Iterator[None]:
        parts = self.reader.components.values()
        learning = [p for part in parts for p in part.parameters() if p.requires_grad]
        try:
            for each in learning:
                each.requires_grad_(False)
            yield
        finally:
            for each in learning:
                each.requires_grad_(True)


class ActivationMatch(Loss):
    """Edited activations of the base against those of the teacher, each site by itself.

    Formula: sum over sites of mean (Phi(h_base) - h_teacher)^2 / mean (h_base - h_teacher)^2, so
    that sites weigh alike and 1 is no edit at all. Each row has the mean over its own tokens, so
    that rows weigh alike, too.

    Args:
        pairs: recorded activations.
        scales: denominators by site, instead of those of the pairs.

    Raises:
        InvalidInput: at a site both are the same, so there is nothing to learn.

    Reference:
        DreamReader (2603.13299): LoReFT between paired prompts.
    """

    def __init__(self, pairs: Pairs, scales: dict[str, float] | None = None):
        pairs.check_same_sites()
        self.pairs = pairs
        self.rows, self.moments = pairs.rows, pairs.calls
        self.scales = scales or {site: _distance(pairs, site) for site in pairs.base}
        for site, scale in self.scales.items():
            if not scale > 0:
                raise InvalidInput(
                    f"{site}: base and teacher have the same activations, there is nothing to learn"
                )

    def terms(self, reft: Reft, batch: Batch) -> dict[str, Tensor]:
        steps = None
        if reft.steps is not None:
            if self.pairs.steps is None:
                raise InvalidInput("these sites have no steps: train adapters without per_step")
            steps = [self.pairs.steps[each] for each in batch.moments.tolist()]
        found: dict[str, Tensor] = {}
        for site, adapter in reft.adapters.items():
            device = next(adapter.parameters()).device
            base, teacher = (
                self._of(values, site, batch, device)
                for values in (self.pairs.base, self.pairs.teacher)
            )
            apart = (adapter(base, steps) - teacher).square()
            if self.pairs.counts is None:
                mean = apart.mean()
            else:
                weights = self.pairs.token_weights(site, batch.rows).to(apart)
                mean = (apart.mean(2) * weights).sum(1).mean()
            found[site] = mean / self.scales[site]
        return found

    def _of(
        self, values: dict[str, Tensor], site: str, batch: Batch, device: torch.device
    ) -> Tensor:
        if site not in values:
            raise InvalidInput(
                f"{site}: there are no activations of this site; recorded are {', '.join(values)}"
            )
        return values[site][batch.rows, batch.moments].to(device).float()


class Together(Loss):
    """A loss and what shall stay as it is: main + weight keep.

    Args:
        main: decides the rows. keep: its rows are drawn beside those of `main`.
        weight: of `keep`, above 0.
    """

    def __init__(self, main: Loss, keep: Loss, weight: float = 1.0):
        if not weight > 0:
            raise InvalidInput(f"the weight of what is kept must be above 0, got {weight}")
        self.main, self.keep, self.weight = main, keep, weight
        self.rows, self.moments = main.rows, main.moments

    def terms(self, reft: Reft, batch: Batch) -> dict[str, Tensor]:
        kept = self.keep.terms(reft, self._draw(batch))
        found = dict(self.main.terms(reft, batch))
        return found | {f"keep {name}": self.weight * each for name, each in kept.items()}

    def culprit(self, reft: Reft, batch: Batch) -> str:
        with torch.no_grad():
            terms = self.main.terms(reft, batch).values()
            fine = all(bool(each.isfinite()) for each in terms)
        return (
            self.keep.culprit(reft, self._draw(batch)) if fine else self.main.culprit(reft, batch)
        )

    @contextmanager
    def ready(self) -> Iterator[None]:
        with self.main.ready(), self.keep.ready():
            yield

    def _draw(self, batch: Batch) -> Batch:
        generator, count = batch.generator, (len(batch.rows),)
        rows = torch.randint(self.keep.rows, count, generator=generator)
        moments = torch.randint(self.keep.moments, count, generator=generator)
        return Batch(rows, moments, batch.seed + 1)


def keep_activations(pairs: Pairs, like: ActivationMatch) -> ActivationMatch:
    """The loss that leaves the base of `pairs` as it is, on the scale of another."""
    return ActivationMatch(Pairs(pairs.base, pairs.base, pairs.steps, pairs.counts), like.scales)


def _distance(pairs: Pairs, site: str) -> float:
    """mean (h_base - h_teacher)^2, each row over its own tokens, without a copy of all of them."""
    total = 0.0
    for row, (base, teacher) in enumerate(zip(pairs.base[site], pairs.teacher[site], strict=True)):
        apart = (base.double() - teacher.double()).square().mean((0, 2))  # [tokens]
        total += float((apart * pairs.token_weights(site, torch.tensor([row]))[0].to(apart)).sum())
    return total / pairs.rows
