"""What autoencoders of a site are measured on beside its rows: exact attributes, and the model."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.harvest import Harvest
from dreamreader.ops import SparseRows
from dreamreader.sae import SparseAutoencoder
from dreamreader.store.store import Store
from dreamreader.training.sae_attributes import PooledRows, attributes_of, score_attributes
from dreamreader.training.sae_splice import SpliceTest, splice_numbers, splice_test_of

_MEAN = 32  # batches from which the mean of a site is taken


class SiteEvaluation:
    """Probes and absorption against attributes, and the model with reconstructions in place.

    Args:
        store: of the rows that are measured. site: in it.
        selection: of its rows, as `StoreDataset` takes it.
        columns: attributes of samples; see `attributes_of`. samples: that are probed.
        harvest: what runs the model; None to leave that out. prompts: that are run.
        rows: batches from which the mean of the site is taken.

    Raises:
        UnknownName, InvalidInput: as `attributes_of` and `splice_test_of`.
    """

    def __init__(
        self,
        store: Store,
        site: str,
        selection: Mapping[str, Any],
        *,
        columns: Sequence[str] | None = None,
        samples: int = 256,
        harvest: Harvest | None = None,
        prompts: int = 0,
        rows: Iterable[Tensor] = (),
    ):
        self._attributes = attributes_of(store, columns, samples)
        self._pooled: PooledRows | None = None
        if self._attributes is not None:
            self._pooled = PooledRows(store, site, self._attributes.samples, dict(selection))
        self._splice: SpliceTest | None = None
        if harvest is not None and prompts:
            mean = _mean(rows)
            self._splice = splice_test_of(harvest, site, prompts, mean, **selection)

    @cached_property
    def _activations(self) -> Tensor:
        assert self._pooled is not None
        return self._pooled.activations()

    @cached_property
    def baseline(self) -> dict[str, Any]:
        """Probes of the activations themselves, with their inputs in place of latents."""
        if self._attributes is None:
            return {}
        return score_attributes(SparseRows.from_dense(self._activations), self._attributes)

    def scores(self, sae: SparseAutoencoder) -> dict[str, Any]:
        """As plain values; None of what needs a threshold that is not there yet."""
        found: dict[str, Any] = {}
        if not sae.encodes_rows_alone:
            return {"no_threshold": True}
        if self._attributes is not None and self._pooled is not None:
            codes = self._pooled.codes(sae)
            found |= score_attributes(codes, self._attributes, sae, self._activations)
        if self._splice is not None:
            found["splice"] = splice_numbers(self._splice.score(sae))
        return found


def _mean(batches: Iterable[Tensor]) -> Tensor:
    total, count = None, 0
    for _, x in zip(range(_MEAN), batches, strict=False):
        own = x.double().sum(0)
        total, count = own if total is None else total + own, count + len(x)
    if total is None:
        raise InvalidInput("evaluation: there are no rows to measure")
    return (total / count).to(torch.float32)
