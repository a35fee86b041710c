"""Directions from label means: differences, contrasts and subspaces of many labels."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.engine import token_means
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.steering.statistics import Statistics

if TYPE_CHECKING:
    from dreamreader.engine import Activation


class LabelMeans:
    """Mean activation of every label at every site and step, over rows and their own tokens.

    `mu[label, step] = 1/(n T) * sum_i sum_t h[i, step, t]`, summed in float64, so that the order of
    the batches does not show in the float32 directions.

    Example:
        >>> means = LabelMeans()
        >>> means.add(cache, ["red", "blue"])               # one label per row
        >>> change = means.difference(site, "red", "blue")  # [steps, features]

    Reference:
        Difference of means as in contrastive activation addition, arXiv 2312.06681.
    """

    def __init__(self):
        self._found: dict[str, Statistics] = {}
        self._labels: dict[str, list[str]] = {}  # their numbers in the statistics of the site

    def add(self, cache: "Mapping[str, Activation | Tensor]", labels: Sequence[str]) -> None:
        """Adds the rows of a cache.

        Args:
            cache: activations of one branch, [rows, steps, tokens, features] or with heads apart;
                or means over tokens as tensors [rows, steps, features].
            labels: one for each row.

        Raises:
            InvalidInput: the number of labels is not that of the rows, several branches are
                recorded, the steps differ from those added before, or a value is not finite.
        """
        for site, activation in cache.items():
            if isinstance(activation, Tensor):
                values = activation.double()
            else:
                values = token_means(site, activation)  # [rows, steps, features]
            if len(labels) != len(values):
                raise InvalidInput(f"{site}: {len(labels)} labels for {len(values)} rows")
            names = list(dict.fromkeys([*self._labels.get(site, []), *labels]))
            numbers = {name: number for number, name in enumerate(names)}
            found = self._found.get(site) or Statistics()
            try:
                found.add(values, torch.tensor([numbers[label] for label in labels]))
            except InvalidInput as error:
                raise InvalidInput(f"{site}: {error}") from error
            self._found[site], self._labels[site] = found, names

    @property
    def sites(self) -> list[str]:
        return list(self._found)

    @property
    def labels(self) -> list[str]:
        return sorted({label for labels in self._labels.values() for label in labels})

    def mean(self, site: str, label: str) -> Float[Tensor, "steps features"]:
        """Mean of one label, float64.

        Raises:
            UnknownName: nothing was added for this site or label.
        """
        labels = self._at(site)
        if label not in labels:
            raise UnknownName("label", label, labels)
        return self._found[site].mean([labels.index(label)])

    def difference(self, site: str, source: str, target: str) -> Float[Tensor, "steps features"]:
        """`mu[target] - mu[source]`, float32: adding it once moves the one mean to the other."""
        return (self.mean(site, target) - self.mean(site, source)).float()

    def contrast(self, site: str, label: str) -> Float[Tensor, "steps features"]:
        """`mu[label]` less the mean of the other labels, float32: what is special about it."""
        others = [other for other in self._labels.get(site, []) if other != label]
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
        labels, found = range(len(self._at(site))), self._found[site]
        within = [found.count([label]) * found.variance([label]).sum(1) for label in labels]
        total = found.count(labels) * found.variance(labels).sum(1)  # [steps]
        share = torch.where(
            total > 0, 1 - torch.stack(within).sum(0) / total.clamp(min=1e-300), 0.0
        )
        return share.clamp(0, 1).float()

    def subspace(self, site: str, rank: int) -> Float[Tensor, "rank features"]:
        """Orthonormal rows that span most of what differs between labels, over all steps, float32.

        Args:
            site: a site that was added.
            rank: rows wanted, at most the number of labels less one.

        Raises:
            InvalidInput: the labels span fewer directions.
        """
        means = torch.stack([self.mean(site, label) for label in self._at(site)])
        centred = (means - means.mean(0)).flatten(0, 1)  # [labels * steps, features]
        limit = min(len(means) - 1, centred.shape[1])
        if not 1 <= rank <= limit:
            raise InvalidInput(f"{site}: rank {rank}; {len(means)} labels span at most {limit}")
        return torch.linalg.svd(centred, full_matrices=False).Vh[:rank].float()

    def _at(self, site: str) -> list[str]:
        if site not in self._labels:
            raise UnknownName("site", site, self._labels)
        return self._labels[site]
