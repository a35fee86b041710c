"""What latents tell of the attributes of samples: k-sparse probes, and absorption."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops import SparseRows
from dreamreader.sae import SparseAutoencoder
from dreamreader.sae.evaluate import probe_latents, score_absorption
from dreamreader.store.batch import Batch
from dreamreader.store.dataset import StoreDataset
from dreamreader.store.store import Store

K = (1, 2, 5)
_OF_SCENES = "source_"  # columns that say what a scene shows
_LEAST = 4  # samples with and without an attribute, in the rows that train and in those held out
_VALUES = 64  # of one attribute
_BATCH = 8192


@dataclass(frozen=True, eq=False)
class Attributes:
    """Samples of a store, and which of them have which attribute.

    Attributes:
        names: such as `color=red`. labels: bool [samples, attributes].
        held_out: samples that only measure. left_out: attributes that too few samples have, or all.
    """

    names: list[str]
    labels: Bool[Tensor, "samples attributes"]
    held_out: Bool[Tensor, " samples"]
    left_out: int

    @property
    def samples(self) -> int:
        return len(self.labels)


def attributes_of(store: Store, columns: Sequence[str] | None, samples: int) -> Attributes | None:
    """The attributes that columns of a store's samples say; None where there are none.

    Args:
        columns: by default what scenes show and their captions say, if enough samples have it.
        samples: the first so many.

    Raises:
        UnknownName: the samples have no such column.
        InvalidInput: a column has too many different values, or too few samples have any of them.
    """
    lines: list[dict[str, Any]] = []
    for unit in store.units:
        lines += store.samples(unit).to_pylist()
        if len(lines) >= samples:
            break
    lines = lines[:samples]
    known = list(lines[0]) if lines else []
    of_scenes = columns is None
    if columns is None:
        unsaid = {f"{_OF_SCENES}{name}" for name in _unsaid(store)}
        columns = [name for name in known if name.startswith(_OF_SCENES) and name not in unsaid]
        columns = [name for name in columns if name != "source_prompt"]
    if not columns:
        return None
    held_out = _hold_out([line.get("prompt") for line in lines])
    names, labels, left_out = [], [], 0
    for column in columns:
        if column not in known:
            raise UnknownName("column of samples", column, known)
        values = [line[column] for line in lines]
        found = sorted({str(each) for each in values if each is not None})
        if len(found) > _VALUES:
            raise InvalidInput(
                f"evaluation.attributes: {column} has {len(found)} values; an attribute has at "
                f"most {_VALUES}"
            )
        for value in found:
            own = torch.tensor([each is not None and str(each) == value for each in values])
            if _is_split(own, held_out):
                names.append(f"{column.removeprefix(_OF_SCENES)}={value}")
                labels.append(own)
            else:
                left_out += 1
    if not names and of_scenes:
        return None
    if not names:
        raise InvalidInput(
            f"evaluation.attributes: no value has {_LEAST} samples with and without it on both "
            f"sides of {len(lines)} samples; harvest more, or give attributes: []"
        )
    return Attributes(names, torch.stack(labels, 1), held_out, left_out)


class PooledRows:
    """Means over all rows of a sample: of activations, and of the latents of an autoencoder.

    Args:
        store: of a harvest. site: in it. samples: the first so many.
        selection: `steps`, `branch` and `tokens` of a `StoreDataset`.
    """

    def __init__(self, store: Store, site: str, samples: int, selection: dict[str, Any]):
        self.store, self.site, self.samples, self.selection = store, site, samples, selection
        self._first: dict[int, int] = {}
        at = 0
        for unit in store.units:
            self._first[unit] = at
            at += len(store.samples(unit))
            if at >= samples:
                break

    def activations(self) -> Float[Tensor, "samples width"]:
        """The mean activation of each sample."""
        width = self.store.sites[self.site].width
        total, count = torch.zeros(self.samples, width, dtype=torch.float64), self._none()
        for x, sample in self._rows():
            total.index_add_(0, sample, x.double())
            count += torch.bincount(sample, minlength=self.samples)
        return (total / count.clamp(min=1).unsqueeze(1)).float()

    def codes(self, sae: SparseAutoencoder) -> SparseRows:
        """The mean code of each latent, zeros included; a latent is silent where it never fired."""
        total = torch.zeros(self.samples * sae.d_sae, dtype=torch.float64)
        count = self._none()
        for x, sample in self._rows():
            with torch.no_grad():
                found = sae.encode_sparse(x.to(sae.W_dec))
            used = int(found.count())
            row, column = found.row_of()[:used].cpu(), found.columns[:used].long().cpu()
            place = sample[row] * sae.d_sae + column
            total.index_add_(0, place, found.values[:used].double().cpu())
            count += torch.bincount(sample, minlength=self.samples)
        mean = total.view(self.samples, -1) / count.clamp(min=1).unsqueeze(1)
        return SparseRows.from_dense(mean.float())

    def _rows(self) -> Iterator[tuple[Tensor, Int[Tensor, " rows"]]]:
        options = {**self.selection, "shuffle": False, "keys": True, "batch_size": _BATCH}
        first, last = torch.full((max(self.store.units) + 1,), self.samples), max(self._first)
        for unit, start in self._first.items():
            first[unit] = start
        for batch in StoreDataset(self.store, self.site, **options):
            assert isinstance(batch, Batch)  # as keys are asked for
            if int(batch.unit.min()) > last:
                return
            sample = first[batch.unit.long()] + batch.sample.long()
            own = sample < self.samples
            if own.any():
                yield batch.values[own], sample[own]

    def _none(self) -> Tensor:
        return torch.zeros(self.samples, dtype=torch.int64)


def score_attributes(
    codes: SparseRows,
    attributes: Attributes,
    sae: SparseAutoencoder | None = None,
    x: Float[Tensor, "samples width"] | None = None,
) -> dict[str, Any]:
    """Probes of one, two and five latents, and absorption, as plain values.

    Args:
        codes: of the samples. sae, x: what made them, and the mean activation of samples; without,
            there is no absorption.
    """
    sizes = [k for k in K if k <= codes.width]
    probes = probe_latents(codes, attributes.labels, attributes.held_out, k=sizes)
    found: dict[str, Any] = {
        "probes": {
            str(k): {
                name: float(getattr(each, name).mean()) for name in ("auroc", "accuracy", "f1")
            }
            for k, each in probes.items()
        }
    }
    single = probes[1]
    own: dict[str, Any] = {
        name: {"latent": int(single.latents[n, 0]), "auroc": float(single.auroc[n])}
        for n, name in enumerate(attributes.names)
    }
    if sae is not None and x is not None:
        absorbed = score_absorption(
            sae, x, attributes.labels, attributes.held_out, single.latents[:, 0], codes=codes
        )
        found["absorbed"] = float(absorbed.absorbed.mean())
        found["silent"] = float(absorbed.silent.mean())
        for n, name in enumerate(attributes.names):
            own[name] |= {
                "absorbed": float(absorbed.absorbed[n]),
                "silent": float(absorbed.silent[n]),
                "absorber": int(absorbed.absorber[n]),
            }
    return {**found, "attributes": own}


def _unsaid(store: Store) -> set[str]:
    """What captions of scenes leave out, so that the model chooses it."""
    scenes = [(job.spec.get("data") or {}).get("scenes") or {} for job in store.manifest.jobs]
    return {name for each in scenes for name in each.get("unsaid", ())}


def _hold_out(prompts: Sequence[Any]) -> Bool[Tensor, " samples"]:
    """Half of the prompts, all samples of a prompt together."""
    order: dict[Any, int] = {}
    number = torch.tensor([order.setdefault(each, len(order)) for each in prompts])
    drawn = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
    return drawn[number] % 2 == 1


def _is_split(own: Tensor, held_out: Tensor) -> bool:
    sides = [own[side] for side in (held_out, ~held_out)]
    return all(_LEAST <= int(each.sum()) <= len(each) - _LEAST for each in sides)
