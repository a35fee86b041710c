"""Latents against the features that are known to have made the activations."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.ops import SparseRows
from dreamreader.sae.evaluate.coder import Coder, encode_and_decode, inference
from dreamreader.sae.evaluate.reconstruction import ReconstructionScores, ReconstructionSums
from dreamreader.sae.matching import cosines, mean_correlation
from dreamreader.sae.synthetic import SyntheticFeatures


@dataclass(frozen=True)
class DetectionScores:
    """Each latent as a detector of the feature that its decoder row is most similar to.

    Attributes:
        features: the feature of each latent, that of the largest |cosine|, int64 [d_sae]. Several
            latents may have the same.
        precision, recall, f1, accuracy: of each latent, float64 [d_sae]; 0 where undefined.
    """

    features: Int[Tensor, " d_sae"]
    precision: Float[Tensor, " d_sae"]
    recall: Float[Tensor, " d_sae"]
    f1: Float[Tensor, " d_sae"]
    accuracy: Float[Tensor, " d_sae"]


@dataclass(frozen=True)
class KnownAnswerScores:
    """An autoencoder against the truth, as SynthSAEBench defines it; means over latents.

    Attributes:
        f1, precision, recall, accuracy: of latents as detectors.
        mcc: mean |cosine| of decoder rows and true directions, in the best one-to-one pairs.
        uniqueness: different features that latents stand for, for each latent.
        true_l0: mean number of features that fire in a row.
        detection: the same for each latent.
        reconstruction: explained variance, L0, dead latents, shrinkage.

    Reference:
        Chanin and Garriga-Alonso, SynthSAEBench, arXiv:2602.14687; `sae_lens.synthetic` 6.54.
    """

    f1: float
    precision: float
    recall: float
    accuracy: float
    mcc: float
    uniqueness: float
    true_l0: float
    detection: DetectionScores
    reconstruction: ReconstructionScores

    def summary(self) -> dict[str, float]:
        """All numbers that are one for the whole autoencoder, by name."""
        own = ("f1", "precision", "recall", "accuracy", "mcc", "uniqueness", "true_l0")
        other = ("explained_variance", "fvu", "l0", "shrinkage", "dead_share")
        found = {name: float(getattr(self, name)) for name in own}
        return found | {name: float(getattr(self.reconstruction, name)) for name in other}


class DetectionCounts:
    """How often latents and their features fire, together and alone, over batches."""

    def __init__(self, features: Int[Tensor, " d_sae"], width: int) -> None:
        self.features = features
        self.rows = 0
        self._order = features.argsort(stable=True)  # latents, feature by feature
        ends = torch.bincount(features, minlength=width).cumsum(0)
        self._begin = torch.cat([ends.new_zeros(1), ends])
        self._both = torch.zeros(len(features), dtype=torch.int64, device=features.device)
        self._latent, self._true = self._both.clone(), self._both.clone()

    def add(self, latents: SparseRows, truth: SparseRows) -> None:
        """Adds a batch: the same rows as latents and as features."""
        if latents.rows != truth.rows:
            raise InvalidInput(
                f"DetectionCounts: latents of {latents.rows} rows, features of {truth.rows}"
            )
        d_sae = len(self.features)
        row, column = _entries(latents)
        fires = torch.zeros(latents.rows, d_sae, dtype=torch.bool, device=row.device)
        fires[row, column] = True
        row, feature = _entries(truth)
        count = self._begin[feature + 1] - self._begin[feature]
        entry = torch.repeat_interleave(count)  # once for each latent of the feature
        first = count.cumsum(0) - count
        among = torch.arange(len(entry), device=row.device) - first[entry]
        latent = self._order[self._begin[feature][entry] + among]
        both = fires[row[entry], latent]
        self._both += torch.bincount(latent[both], minlength=d_sae)
        self._true += torch.bincount(latent, minlength=d_sae)
        self._latent += torch.bincount(column, minlength=d_sae)
        self.rows += latents.rows

    def scores(self) -> DetectionScores:
        """What the batches so far give."""
        both, latent, true = (x.double() for x in (self._both, self._latent, self._true))
        wrong = latent + true - 2 * both
        return DetectionScores(
            self.features,
            _share(both, latent),
            _share(both, true),
            _share(2 * both, latent + true),
            1 - wrong / max(self.rows, 1),
        )


def score_known_answers(
    sae: Coder,
    world: SyntheticFeatures,
    rows: int = 100_000,
    batch: int = 1024,
    seed: int = 2**31,
) -> KnownAnswerScores:
    """Measures an autoencoder on activations whose features are known.

    Args:
        sae: what has encode, decode and W_dec.
        world: what the activations are drawn from.
        rows: how many are drawn. batch: at a time.
        seed: of these rows; another one than the training had.

    Raises:
        InvalidInput: the widths differ, or there are no rows.

    Example:
        >>> import torch
        >>> from dreamreader.sae.synthetic import SyntheticConfig
        >>> world = SyntheticFeatures(SyntheticConfig(features=8, d_in=8, roots=2, depth=1))
        >>> class Oracle:  # inverts the directions
        ...     W_dec = world.directions
        ...     def encode(self, x):
        ...         exact = (x - world.bias).double() @ torch.linalg.inv(self.W_dec.double())
        ...         return torch.where(exact > 0.01, exact, 0).float()
        ...     def decode(self, codes):
        ...         return codes @ self.W_dec + world.bias
        >>> scores = score_known_answers(Oracle(), world, rows=2000)
        >>> round(scores.f1, 2), round(scores.mcc, 2), scores.uniqueness
        (1.0, 1.0, 1.0)
    """
    similar = cosines(sae.W_dec, world.directions).abs()
    features = similar.argmax(1)
    counts = DetectionCounts(features, world.config.features)
    sums = ReconstructionSums(sae.W_dec)
    active = 0
    with inference(sae):
        for index, begin in enumerate(range(0, rows, batch)):
            x, truth = world.batch(index, min(batch, rows - begin), seed)
            codes, rebuilt = encode_and_decode(sae, x)
            sums.add(x, rebuilt, codes)
            counts.add(codes, truth)
            active += int(truth.count())
    reconstruction, detection = sums.scores(), counts.scores()
    means = {
        name: float(getattr(detection, name).mean())
        for name in ("f1", "precision", "recall", "accuracy")
    }
    return KnownAnswerScores(
        **means,
        mcc=mean_correlation(sae.W_dec, world.directions),
        uniqueness=len(features.unique()) / len(features),
        true_l0=active / rows,
        detection=detection,
        reconstruction=reconstruction,
    )


def _entries(codes: SparseRows) -> tuple[Tensor, Tensor]:
    used = codes.values != 0
    return codes.row_of()[used], codes.columns[used].long()


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1), 0.0)
