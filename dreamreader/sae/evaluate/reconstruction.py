"""How well rows are rebuilt, from how many latents, and which latents are used."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dreamreader.errors import InvalidInput
from dreamreader.ops import SparseRows
from dreamreader.sae.evaluate.coder import Coder, encode_and_decode, inference
from dreamreader.stats import spearman


@dataclass(frozen=True)
class FrequencyHistogram:
    """Latents by how often they fire.

    Attributes:
        edges: of the bins of log10 of the share of rows, [bins + 1].
        counts: latents in each bin; what lies outside is in the first or last one.
        dead: latents that never fired, in no bin.
    """

    edges: Float[Tensor, " bins_plus_1"]
    counts: Int[Tensor, " bins"]
    dead: int


@dataclass(frozen=True)
class LotteryScores:
    """Whether rare latents win by strength: the activation lottery of selections over a batch.

    Attributes:
        correlation: Spearman's, of how often a latent fires with its mean strength when it does,
            over latents that fired; below 0 the rare ones are strong. NaN with fewer than 2.
        rare_share: of all entries, those of latents that fire less than `rare` times as often as
            the mean latent that fired.
        rare_energy: their share of the sum of squared strengths times |W_dec_j|^2.

    Reference:
        The name is from Oozeer et al., Distribution-aware feature selection for SAEs,
        arXiv:2508.21324, which gives no formula; these are ours.
    """

    correlation: float
    rare_share: float
    rare_energy: float


@dataclass(frozen=True)
class ReconstructionScores:
    """How well rows are rebuilt, and from what.

    Attributes:
        rows: how many were measured.
        fvu: sum |x - x_hat|^2 / sum |x - mean|^2, the fraction of variance unexplained.
        l0: mean number of latents of a row.
        shrinkage: mean of |x_hat| / |x| over rows that are longer than 1e-6; 1 is right.
        fired: rows in which each latent fired, int64 [d_sae].
        strength: sum of each latent's values [d_sae]. energy: of their squares, times the squared
            length of its decoder row.
    """

    rows: int
    fvu: float
    l0: float
    shrinkage: float
    fired: Int[Tensor, " d_sae"]
    strength: Float[Tensor, " d_sae"]
    energy: Float[Tensor, " d_sae"]

    @property
    def explained_variance(self) -> float:
        """1 - FVU."""
        return 1 - self.fvu

    @property
    def dead(self) -> int:
        """Latents that never fired."""
        return int((self.fired == 0).sum())

    @property
    def dead_share(self) -> float:
        """Share of latents that never fired."""
        return self.dead / len(self.fired)

    @cached_property
    def frequency(self) -> Float[Tensor, " d_sae"]:
        """Share of rows in which each latent fired."""
        return self.fired.double() / self.rows

    def histogram(self, bins: int = 28, lowest: float = -7.0) -> FrequencyHistogram:
        """Counts latents by log10 of their frequency, from `lowest` to 0.

        Raises:
            InvalidInput: no bins, or `lowest` is not below 0.
        """
        if bins < 1 or not lowest < 0:
            raise InvalidInput(f"histogram: needs bins >= 1, lowest < 0, got {bins} and {lowest}")
        edges = torch.linspace(lowest, 0, bins + 1, dtype=torch.float64)
        logs = self.frequency[self.fired > 0].log10()
        place = torch.searchsorted(edges, logs, right=True) - 1
        counts = torch.bincount(place.clamp(0, bins - 1), minlength=bins)
        return FrequencyHistogram(edges, counts, self.dead)

    def lottery(self, rare: float = 0.1) -> LotteryScores:
        """Whether latents that fire seldom win by strength.

        Args:
            rare: a latent is rare below this times the mean frequency of those that fired.
        """
        alive = self.fired > 0
        fired = self.fired[alive].double()
        means = self.strength[alive] / fired
        known = len(fired) > 1
        seldom = fired < rare * fired.mean()
        energy = self.energy[alive]
        return LotteryScores(
            spearman(fired.numpy(), means.numpy()) if known else float("nan"),
            float(fired[seldom].sum() / fired.sum()),
            float(energy[seldom].sum() / energy.sum()),
        )


class ReconstructionSums:
    """Sums over batches, on the CPU in float64: variance is a small difference of large sums."""

    def __init__(self, decoder: Float[Tensor, "d_sae d_in"]) -> None:
        self._squares = decoder.detach().double().square().sum(1).cpu()
        self._fired = torch.zeros(len(decoder), dtype=torch.int64)
        self._strength = torch.zeros(len(decoder), dtype=torch.float64)
        self._energy = torch.zeros(len(decoder), dtype=torch.float64)
        self._first: Tensor | None = None  # mean of the first batch
        self._sum: Tensor = torch.zeros(())  # of rows less that mean
        self._square = self._error = self._ratio = 0.0
        self._rows = self._long = 0

    def add(
        self, x: Float[Tensor, "rows d_in"], rebuilt: Float[Tensor, "rows d_in"], codes: SparseRows
    ) -> None:
        """Adds a batch."""
        if not len(x):
            return
        x, rebuilt = x.double(), rebuilt.double()
        if self._first is None:  # taken from all rows, so that a common offset costs no digits
            self._first = x.mean(0)
            self._sum = torch.zeros_like(self._first)
        moved = x - self._first
        self._sum = self._sum + moved.sum(0)
        self._square += float(moved.square().sum())
        self._error += float((x - rebuilt).square().sum())
        length = x.norm(dim=1)
        long = length > 1e-6
        self._ratio += float((rebuilt.norm(dim=1)[long] / length[long]).sum())
        self._long += int(long.sum())
        self._rows += len(x)
        used = codes.values != 0
        column = codes.columns[used].long().cpu()
        value = codes.values[used].double().cpu()
        size = len(self._fired)
        self._fired += torch.bincount(column, minlength=size)
        self._strength += torch.bincount(column, value, minlength=size)
        self._energy += torch.bincount(column, value.square(), minlength=size) * self._squares

    def scores(self) -> ReconstructionScores:
        """What the batches so far give.

        Raises:
            InvalidInput: there were no rows, they are all equal, or something is not finite.
        """
        if not self._rows:
            raise InvalidInput("no rows to measure: the batches are empty")
        variance = self._square - float(self._sum.square().sum()) / self._rows
        if variance <= 1e-12 * self._square or not self._square:
            raise InvalidInput(f"all {self._rows} rows are equal: no variance to explain")
        fvu = self._error / variance
        if not fvu < torch.inf:
            raise InvalidInput("activations or reconstructions have values that are not finite")
        return ReconstructionScores(
            self._rows,
            fvu,
            float(self._fired.sum()) / self._rows,
            self._ratio / self._long if self._long else float("nan"),
            self._fired.clone(),
            self._strength.clone(),
            self._energy.clone(),
        )


def score_reconstruction(
    sae: Coder, batches: Iterable[Float[Tensor, "rows d_in"]], *, as_trained: bool = False
) -> ReconstructionScores:
    """Measures how an autoencoder rebuilds batches of rows, one at a time.

    Args:
        sae: what has encode, decode and W_dec; measured in `eval()` mode.
        batches: activations [rows, d_in]; sizes may differ.
        as_trained: with the selection of `train()` mode in place of thresholds, on a copy.

    Raises:
        InvalidInput: there are no rows, their width is another one, they do not vary, or something
            is not finite.

    Example:
        >>> import torch
        >>> class Identity:
        ...     W_dec = torch.eye(3)
        ...     encode = decode = staticmethod(lambda x: x)
        >>> scores = score_reconstruction(Identity(), [torch.eye(3)])
        >>> scores.fvu, scores.l0, scores.dead
        (0.0, 1.0, 0)
    """
    sums = ReconstructionSums(sae.W_dec)
    if as_trained and isinstance(sae, nn.Module):
        sae = copy.deepcopy(sae).train()  # a pool is drawn for each batch, which the copy keeps
    with torch.no_grad() if as_trained else inference(sae):
        for x in batches:
            codes, rebuilt = encode_and_decode(sae, x)
            sums.add(x, rebuilt, codes)
    return sums.scores()
