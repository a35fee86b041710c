"""What latents respond to: strongest rows with their maps, activity by step, attributes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dreamreader.engine import Activation, one_branch
from dreamreader.errors import InvalidInput
from dreamreader.sae.codec import SparseCodec


@dataclass(frozen=True, eq=False)
class StrongestRows:
    """The strongest rows of one latent, strongest first.

    Attributes:
        rows: numbers of rows, in the order in which they were added. scores: their largest codes.
        maps: mean code over steps, [tokens] for each row; padding is NaN.
    """

    rows: list[int]
    scores: list[float]
    maps: list[Float[Tensor, " tokens"]]


class FeatureExamples:
    """Collects, batch by batch, what every latent of an autoencoder responds to.

    Nothing is left out: the strongest rows of a latent are those of all batches together.

    Args:
        sae: or a matrix of directions [features, d_in], whose codes are then relu(<x, v>).
        top: rows that are kept for each latent.

    Attributes:
        rows: how many were added. tokens: how many values, over all steps.
        fired: int64 [latents], values above 0. steps: numbers of the denoising steps seen.

    Raises:
        InvalidInput: `top` is below 1; activations of another width or other steps are added.

    Example:
        >>> from dreamreader.sae import SparseAutoencoder, TopK
        >>> found = FeatureExamples(SparseAutoencoder(8, 32, TopK(2)).eval(), top=3)
        >>> found.add_tensor(torch.randn(5, 1, 16, 8))
        >>> len(found.of(int(found.fired.argmax())).rows)
        3
    """

    def __init__(self, sae: SparseCodec | Float[Tensor, "features d_in"], top: int = 12):
        if top < 1:
            raise InvalidInput(f"FeatureExamples: top must be at least 1, got {top}")
        if isinstance(sae, SparseCodec) and (sae.training or not sae.encodes_rows_alone):
            raise InvalidInput(
                "FeatureExamples: codes would depend on the batch; call sae.eval(), and give "
                "sae.threshold a value where the selection is over a batch"
            )
        self.sae, self.top = sae, top
        self.latents = sae.d_sae if isinstance(sae, SparseCodec) else len(sae)
        self.rows, self.tokens = 0, 0
        self.steps: tuple[int, ...] = ()
        self.hw: tuple[int, int] | None = None
        self.fired = torch.zeros(self.latents, dtype=torch.int64)
        self._scores = torch.full((self.latents, top), -torch.inf)
        self._numbers = torch.full((self.latents, top), -1)
        self._maps: dict[tuple[int, int], Tensor] = {}
        self._by_step: Tensor | None = None  # sums, [latents, steps]
        self._seen: Tensor | None = None  # values, [steps]
        self._correlations: dict[str, _Correlation] = {}

    def add(
        self, activation: Activation, labels: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        """Adds a recording of one branch; see `add_tensor`."""
        values = one_branch(activation.site, activation)
        steps = tuple(each.step for each in activation.steps)
        padding = activation.padding
        self.add_tensor(values, steps=steps, padding=padding, labels=labels)
        self.hw = activation.hw if activation.tokens is None else None

    @torch.no_grad()
    def add_tensor(
        self,
        x: Float[Tensor, "rows steps tokens d_in"],
        *,
        steps: Sequence[int] | None = None,
        padding: Bool[Tensor, "rows steps tokens"] | None = None,
        labels: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Adds rows.

        Args:
            x: activations. steps: their numbers. padding: what is no token.
            labels: of each row, by name of the attribute; None for a row that has none.
        """
        rows, count, tokens, _ = x.shape
        numbers = tuple(range(count)) if steps is None else tuple(steps)
        if self.steps and numbers != self.steps:
            raise InvalidInput(f"FeatureExamples: rows of steps {self.steps}, then of {numbers}")
        for name, values in (labels or {}).items():
            if len(values) != rows:
                raise InvalidInput(
                    f"FeatureExamples: {name} has {len(values)} labels for {rows} rows"
                )
        self.steps = numbers
        real = torch.ones(rows, count, tokens, dtype=torch.bool) if padding is None else ~padding
        entry, feature, value = self._codes(x, real.to(x.device))
        row, step, token = entry // (count * tokens), entry // tokens % count, entry % tokens
        self._count(feature, step, value, real)
        best = torch.full((rows * self.latents,), -torch.inf)
        best.scatter_reduce_(0, row * self.latents + feature, value, "amax")
        best = best.view(rows, self.latents)
        kept = self._keep(best)
        chosen = kept[row, feature].nonzero().squeeze(1)
        self._draw(row[chosen], feature[chosen], token[chosen], value[chosen], real, kept)
        for name, values in (labels or {}).items():
            self._correlations.setdefault(name, _Correlation(self.latents)).add(
                best.clamp(min=0), values
            )
        self.rows += rows

    def of(self, feature: int) -> StrongestRows:
        """The strongest rows of a latent; fewer than `top` where it was active on fewer.

        Raises:
            InvalidInput: there is no such latent.
        """
        if not 0 <= feature < self.latents:
            raise InvalidInput(f"FeatureExamples: latent {feature} of {self.latents} is none")
        rows = [n for n in self._numbers[feature].tolist() if n >= 0]
        scores = self._scores[feature, : len(rows)].tolist()
        return StrongestRows(rows, scores, [self._maps[feature, row] for row in rows])

    @property
    def frequency(self) -> Float[Tensor, " latents"]:
        """The share of values at which each latent is active."""
        return self.fired / max(1, self.tokens)

    @property
    def by_step(self) -> Float[Tensor, "latents steps"]:
        """The mean code at each step.

        Raises:
            InvalidInput: nothing was added.
        """
        if self._by_step is None or self._seen is None:
            raise InvalidInput("FeatureExamples: nothing was added")
        return self._by_step / self._seen.clamp(min=1)

    def correlations(self) -> dict[str, Float[Tensor, " latents"]]:
        """For each `attribute=value`, its correlation with the largest code of a row.

        NaN where a latent or a label is the same in all rows.
        """
        return {
            f"{name}={value}": found
            for name, each in self._correlations.items()
            for value, found in each.all().items()
        }

    def _codes(
        self, x: Tensor, real: Bool[Tensor, "rows steps tokens"]
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
        """Entries [rows * steps * tokens], latents and codes of all above 0, on the CPU."""
        where = real.flatten().nonzero().squeeze(1)
        flat = x.reshape(-1, x.shape[-1])[where]
        if isinstance(self.sae, SparseCodec):
            flat = flat.to(self.sae.W_dec.device, self.sae.W_dec.dtype)
            codes = self.sae.encode_sparse(flat)
            used = int(codes.count())
            entry, feature = codes.row_of()[:used], codes.columns[:used].long()
            value = codes.values[:used]
        else:
            dense = (flat.to(self.sae) @ self.sae.T).clamp(min=0)
            entry, feature = dense.nonzero(as_tuple=True)
            value = dense[entry, feature]
        keep = value > 0
        entry = where.to(entry.device)[entry[keep]]
        return entry.cpu(), feature[keep].cpu(), value[keep].float().cpu()

    def _count(self, feature: Tensor, step: Tensor, value: Tensor, real: Tensor) -> None:
        self.fired += torch.bincount(feature, minlength=self.latents)
        self.tokens += int(real.sum())
        steps = len(self.steps)
        if self._by_step is None or self._seen is None:
            self._by_step = torch.zeros(self.latents, steps, dtype=torch.float64)
            self._seen = torch.zeros(steps, dtype=torch.float64)
        self._by_step.view(-1).index_add_(0, feature * steps + step, value.double())
        self._seen += real.sum((0, 2)).double().cpu()

    def _keep(self, best: Float[Tensor, "rows latents"]) -> Bool[Tensor, "rows latents"]:
        """Merges new rows into the strongest; which of them are among these now."""
        rows = len(best)
        new = torch.arange(self.rows, self.rows + rows).expand(self.latents, rows)
        scores = torch.cat([self._scores, best.T], 1)
        numbers = torch.cat([self._numbers, torch.where(best.T > 0, new, -1)], 1)
        scores = torch.where(numbers < 0, -torch.inf, scores)
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, : self.top]
        before = self._numbers
        self._scores, self._numbers = scores.gather(1, order), numbers.gather(1, order)
        gone = (before >= 0) & ~(before.unsqueeze(2) == self._numbers.unsqueeze(1)).any(2)
        for feature, slot in gone.nonzero().tolist():
            del self._maps[feature, int(before[feature, slot])]
        kept = torch.zeros(rows, self.latents, dtype=torch.bool)
        feature, slot = (self._numbers >= self.rows).nonzero(as_tuple=True)
        kept[self._numbers[feature, slot] - self.rows, feature] = True
        return kept

    def _draw(
        self,
        row: Tensor,
        feature: Tensor,
        token: Tensor,
        value: Tensor,
        real: Bool[Tensor, "rows steps tokens"],
        kept: Bool[Tensor, "rows latents"],
    ) -> None:
        """Maps of the rows that are new among the strongest."""
        at = torch.full(kept.shape, -1)
        pairs = kept.nonzero()
        at[kept] = torch.arange(len(pairs))
        tokens = real.shape[2]
        maps = torch.zeros(len(pairs), tokens)
        maps.view(-1).index_add_(0, at[row, feature] * tokens + token, value)
        counts = real.sum(1).cpu()  # [rows, tokens]
        for number, (in_batch, latent) in enumerate(pairs.tolist()):
            steps = counts[in_batch]
            mean = torch.where(steps > 0, maps[number] / steps, torch.nan)
            self._maps[latent, self.rows + in_batch] = mean


@dataclass(eq=False)
class _Correlation:
    """Sums from which the correlation of a row's code with each value of an attribute follows."""

    latents: int
    rows: int = 0
    total: Tensor = field(init=False)
    square: Tensor = field(init=False)
    by_value: dict[Any, Tensor] = field(default_factory=dict)
    counts: dict[Any, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.latents, dtype=torch.float64)
        self.square = torch.zeros(self.latents, dtype=torch.float64)

    def add(self, scores: Float[Tensor, "rows latents"], values: Sequence[Any]) -> None:
        for own, value in zip(scores.double(), values, strict=True):
            if value is None:
                continue
            self.rows += 1
            self.total += own
            self.square += own.square()
            self.by_value.setdefault(value, torch.zeros_like(self.total)).add_(own)
            self.counts[value] = self.counts.get(value, 0) + 1

    def all(self) -> dict[Any, Float[Tensor, " latents"]]:
        found = {}
        for value, total in self.by_value.items():
            share = self.counts[value] / self.rows
            mean = self.total / self.rows
            spread = (self.square / self.rows - mean.square()).clamp(min=0).sqrt()
            together = total / self.rows - mean * share
            found[value] = together / (spread * (share * (1 - share)) ** 0.5)
        return found
