"""Directions from label means: differences, contrasts and subspaces, summed batch by batch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName

if TYPE_CHECKING:
    from dreamreader.engine import Activation


class LabelMeans:
    """Mean activation of every label at every site and step, over rows and tokens.

    `mu[label, step] = 1/(n T) * sum_i sum_t h[i, step, t]`, summed in float64, so that the order of
    the batches does not show in the float32 directions.

    Example:
        >>> means = LabelMeans()
        >>> means.add(cache, ["red", "blue"])               # one label per row
        >>> means.difference(site, "red", "blue").shape     # [steps, features]

    Reference:
        Difference of means as in contrastive activation addition, arXiv 2312.06681.
    """

    def __init__(self):
        self._sums: dict[str, dict[str, Float[Tensor, "steps features"]]] = {}
        self._counts: dict[str, dict[str, int]] = {}
        self._squares: dict[
            str, Float[Tensor, " steps"]
        ] = {}  # sum over rows of |mean over tokens|^2

    def add(self, cache: "Mapping[str, Activation]", labels: Sequence[str]) -> None:
        """Adds the rows of a cache.

        Args:
            cache: activations of one branch, [rows, steps, tokens, features] or with heads apart.
            labels: one for each row.

        Raises:
            InvalidInput: the number of labels is not that of the rows, several branches are
                recorded, the steps differ from those added before, or a value is not finite.
        """
        for site, activation in cache.items():
            values = _flat(site, activation)  # [rows, steps, tokens, features]
            if len(labels) != len(values):
                raise InvalidInput(f"{site}: {len(labels)} labels for {len(values)} rows")
            means = values.double().mean(2)  # [rows, steps, features]
            if not bool(means.isfinite().all()):
                raise InvalidInput(f"{site}: recorded values are not finite")
            sums, counts = self._sums.setdefault(site, {}), self._counts.setdefault(site, {})
            for row, label in zip(means, labels, strict=True):
                if any(total.shape != row.shape for total in sums.values()):
                    had = [list(total.shape) for total in sums.values()][0]
                    raise InvalidInput(
                        f"{site}: [steps, features] is {list(row.shape)}, before {had}"
                    )
                sums[label] = sums[label] + row if label in sums else row.clone()
                counts[label] = counts.get(label, 0) + 1
            squares = means.square().sum((0, 2))
            self._squares[site] = self._squares.get(site, torch.zeros_like(squares)) + squares

    @property
    def sites(self) -> list[str]:
        return list(self._sums)

    @property
    def labels(self) -> list[str]:
        return sorted({label for sums in self._sums.values() for label in sums})

    def mean(self, site: str, label: str) -> Float[Tensor, "steps features"]:
        """Mean of one label, float64.

        Raises:
            UnknownName: nothing was added for this site or label.
        """
        if site not in self._sums:
            raise UnknownName("site", site, self._sums)
        if label not in self._sums[site]:
            raise UnknownName("label", label, self._sums[site])
        return self._sums[site][label] / self._counts[site][label]

    def difference(self, site: str, source: str, target: str) -> Float[Tensor, "steps features"]:
        """`mu[target] - mu[source]`, float32: adding it once moves the one mean to the other."""
        return (self.mean(site, target) - self.mean(site, source)).float()

    def contrast(self, site: str, label: str) -> Float[Tensor, "steps features"]:
        """`mu[label]` less the mean of the other labels, float32: what is special about it."""
        others = [other for other in self._sums.get(site, {}) if other != label]
        own = self.mean(site, label)
        if not others:
            raise InvalidInput(f"{site}: {label!r} is the only label, there is nothing to contrast")
        return (own - torch.stack([self.mean(site, other) for other in others]).mean(0)).float()

    def explained(self, site: str) -> Float[Tensor, " steps"]:
        """Share of the variance between rows that the labels explain, for each step (eta squared).

        `sum_l n_l |mu_l - mu|^2 / sum_i |h_i - mu|^2` over token means h_i. Labels that say nothing
        still explain about `(labels - 1) / (rows - 1)`.

        Args:
            site: a site that was added.

        Returns:
            Values in [0, 1], float32; 0 where all rows are equal.
        """
        labels = self._sums.get(site, {})
        means = torch.stack([self.mean(site, label) for label in labels]) if labels else None
        if means is None:
            raise UnknownName("site", site, self._sums)
        counts = torch.tensor([self._counts[site][label] for label in labels], dtype=torch.float64)
        rows = counts.sum()
        middle = (means * counts[:, None, None]).sum(0) / rows
        between = ((means - middle).square().sum(2) * counts[:, None]).sum(0)
        total = self._squares[site] - rows * middle.square().sum(1)
        share = torch.where(total > 0, between / total.clamp(min=1e-300), torch.zeros_like(total))
        return share.clamp(0, 1).float()

    def subspace(self, site: str, rank: int) -> Float[Tensor, "rank features"]:
        """Orthonormal rows that span most of what differs between labels, over all steps, float32.

        Args:
            site: a site that was added.
            rank: rows wanted, at most the number of labels less one.

        Raises:
            InvalidInput: the labels span fewer directions.
        """
        means = torch.stack([self.mean(site, label) for label in self._sums.get(site, {})])
        centred = (means - means.mean(0)).flatten(0, 1)  # [labels * steps, features]
        limit = min(len(means) - 1, centred.shape[1])
        if not 1 <= rank <= limit:
            raise InvalidInput(f"{site}: rank {rank}; {len(means)} labels span at most {limit}")
        return torch.linalg.svd(centred, full_matrices=False).Vh[:rank].float()


def random_like(
    direction: Float[Tensor, "*steps features"], seed: int
) -> Float[Tensor, "*steps features"]:
    """A random direction of the same norm: the control of every steering result.

    With one direction per step, the random unit vector is the same at all steps and only its norm
    follows: independent draws per step would partly cancel and make a weaker control.

    Args:
        direction: the direction to match.
        seed: of the draw, on the CPU.

    Returns:
        A new tensor of the same shape, dtype and, row by row, norm.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(direction.shape[-1], generator=generator, dtype=torch.float64)
    norm = direction.double().norm(dim=-1, keepdim=True)
    return (draw / draw.norm() * norm.cpu()).to(direction)


def _flat(site: str, activation: "Activation") -> Float[Tensor, "rows steps tokens features"]:
    if len(activation.branches) > 1:
        raise InvalidInput(
            f"{site}: recorded for the branches {', '.join(activation.branches)}; choose one, "
            "e.g. with select(branch='cond')"
        )
    values = activation.tensor
    return values.flatten(3) if values.ndim > 4 else values
