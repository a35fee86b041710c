"""Where autoencoders take their rows from: a store, or known answers."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.fitting import ByStep
from dreamreader.sae.evaluate import shuffle_features
from dreamreader.sae.synthetic import SyntheticConfig, SyntheticFeatures
from dreamreader.store.dataset import StoreDataset
from dreamreader.store.store import Store
from dreamreader.training.sae_specs import SaeSpec
from dreamreader.training.stored import chosen_sites

KNOWN = "known answers"  # the site of rows that no model made
_HELD_OUT = 2**31  # seed of rows that are measured


def first_rows(dataset: StoreDataset, rows: int) -> Iterator[Float[Tensor, "rows width"]]:
    """Batches of a dataset without keys, up to so many rows."""
    for batch in dataset:
        assert isinstance(batch, Tensor)
        yield batch[:rows]
        rows -= len(batch)
        if rows <= 0:
            return


class RowSource(Protocol):
    """Rows by site."""

    spec: SaeSpec

    @property
    def sites(self) -> Sequence[str]: ...

    def width(self, site: str) -> int: ...

    def batches(self, site: str, rank: int = 0, world: int = 1) -> Any:
        """As `train_sae` takes them; of a process among several, its share of each batch."""
        ...

    def held_out(self, site: str) -> Iterator[Float[Tensor, "rows width"]]:
        """Rows that are measured."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells these rows from others."""
        ...


class StoreSource:
    """Rows of a store.

    Args:
        spec: of the training. path: of the store. evaluated: of that which is measured.

    Raises:
        InvalidInput, UnknownName: there is no store, or it has no such site.
    """

    def __init__(self, spec: SaeSpec, path: Path, evaluated: Path | None):
        self.spec, self.store = spec, Store(path)
        self.evaluated = self.store if evaluated is None else Store(evaluated)
        self.sites = chosen_sites(self.store, spec.sites)
        for site in self.sites:
            if site not in self.evaluated.sites:
                raise InvalidInput(f"evaluation.store: {self.evaluated.path} has no {site}")

    def width(self, site: str) -> int:
        return self.store.sites[site].width

    def batches(self, site: str, rank: int = 0, world: int = 1) -> StoreDataset:
        size = self.spec.training.batch_size
        found = self._dataset(
            self.store, site, size // world, self.spec.seeds[0], True, rank, world
        )
        if len(found) == 0:
            raise InvalidInput(
                f"training.batch_size: {site} has {found.rows:,} rows, fewer than {size:,}"
            )
        return found

    def held_out(self, site: str) -> Iterator[Tensor]:
        rows = self.spec.evaluation.rows
        size = min(self.spec.training.batch_size, rows)
        return first_rows(
            self._dataset(self.evaluated, site, size, _HELD_OUT, drop_last=False), rows
        )

    def identity(self) -> dict[str, Any]:
        found = {}
        for name, store in (("store", self.store), ("evaluated", self.evaluated)):
            runs = sorted(set(store.index["run"].to_pylist()))
            units = hashlib.sha256(repr(store.units).encode()).hexdigest()
            found[name] = {"runs": runs, "units": units}
        return found

    @property
    def selection(self) -> dict[str, Any]:
        """Which rows, as a `StoreDataset` takes it."""
        spec = self.spec
        tokens = [spec.tokens] if isinstance(spec.tokens, int) else spec.tokens
        return {"steps": spec.chosen_steps, "branch": spec.branch, "tokens": tokens}

    def _dataset(
        self,
        store: Store,
        site: str,
        size: int,
        seed: int,
        drop_last: bool,
        rank: int = 0,
        world: int = 1,
    ) -> StoreDataset:
        own = {**self.selection, "seed": seed, "drop_last": drop_last}
        own |= {"rank": rank, "world": world}
        return StoreDataset(store, site, batch_size=size, **own)


class KnownSource:
    """Rows made of known features."""

    sites = (KNOWN,)

    def __init__(self, spec: SaeSpec):
        assert spec.known_answers is not None
        self.spec, self.config = spec, spec.known_answers.config

    @property
    def world(self) -> SyntheticFeatures:
        return _features_of(self.config)

    def width(self, site: str) -> int:
        return self.config.d_in

    def batches(self, site: str, rank: int = 0, world: int = 1) -> ByStep:
        whole = self.world.batches(self.spec.training.batch_size, self.spec.seeds[0])
        if world == 1:
            return whole
        return ByStep(lambda step: whole.draw(step).chunk(world)[rank], of=whole.of)

    def held_out(self, site: str) -> Iterator[Tensor]:
        size, rows = self.spec.training.batch_size, self.spec.evaluation.rows
        for index, start in enumerate(range(0, rows, size)):
            yield self.world.batch(index, min(size, rows - start), _HELD_OUT)[0]

    def identity(self) -> dict[str, Any]:
        return {}


@lru_cache(maxsize=1)
def _features_of(config: SyntheticConfig) -> SyntheticFeatures:
    """Made once in a process: pushing many directions apart takes a minute."""
    return SyntheticFeatures(config)


class Shuffling:
    """Batches of a site, with those that the shuffled controls learn from.

    Args:
        batches: of a site. site: under which the others find them. names: of the controls.
    """

    def __init__(self, batches: Any, site: str, names: Sequence[str]):
        self._batches, self._site, self._names = batches, site, names

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.pair, self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)  # state, epoch and identity are those of the rows

    def pair(self, x: Tensor) -> dict[str, Tensor]:
        found = {self._site: x}
        if self._names:
            (shuffled,) = shuffle_features([x])
            found |= dict.fromkeys(self._names, shuffled)
        return found


def with_shuffled(batches: Any, site: str, names: Sequence[str]) -> Any:
    """Batches by name, as several autoencoders of one pass read them."""
    pairs = Shuffling(batches, site, names)
    if isinstance(batches, ByStep):
        return ByStep(lambda step: pairs.pair(batches.draw(step)), of=batches.of)
    return pairs
