"""Pairs from two stores that were harvested over the same prompts and seeds."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.store.rows import RowBlock, blocks_of, of_unit
from dreamreader.store.store import Store

KEYS = ("step", "sigma")
_EQUAL = 1e-3  # relative: tables of schedulers are rounded
_KEY = [("sample", np.int64), ("time", np.float64), ("evaluation", np.int64), ("token", np.int64)]


@dataclass(frozen=True, eq=False)
class StoredPairs:
    """Rows of two stores that belong together.

    Attributes:
        source, target: as they are stored. groups: number of the prompt of each.
        steps: of the target. sigmas: there, NaN where the scheduler says none.
    """

    source: Float[Tensor, "rows d_source"]
    target: Float[Tensor, "rows d_target"]
    groups: Int[Tensor, " rows"]
    steps: Int[Tensor, " rows"]
    sigmas: Float[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.source)


class StorePairs:
    """Pairs rows of two stores by prompt, seed, step and token, a unit of the target at a time.

    Harvests of the same data, seeds, tokens and `token_seed` pair row by row; of others what both
    have is paired, whatever the units. One unit of each store is in memory. The stores of one
    harvest of two subjects are paired by the steps of the target, whose noise both saw.

    Args:
        source, target: the stores. site, target_site: one of each.
        branch: guidance branch; None of language models.
        by: which calls belong together: of one `step`, whose noise has to be the same, or of one
            `sigma`.

    Attributes:
        unpaired: rows of source and target without a partner, once all pairs have come.

    Raises:
        UnknownName: there is no such site, branch or key.
        InvalidInput: the stores have no prompt and seed in common, or tokens of one number do not
            belong together.

    Example:
        >>> pairs = StorePairs(one, other, "unet.mid_block", "unet.mid_block")  # doctest: +SKIP
        >>> for part in pairs:                                                  # doctest: +SKIP
        ...     moments.add(part.source, part.target)
    """

    def __init__(
        self,
        source: Store,
        target: Store,
        site: str,
        target_site: str,
        *,
        branch: str | None = "cond",
        by: str = "step",
    ):
        for store in (source, target):
            if not isinstance(store, Store):
                raise InvalidInput(
                    f"StorePairs: two open stores are needed, got {type(store).__name__}; "
                    "Store(path) opens one"
                )
        if by not in KEYS:
            raise UnknownName("key of stored pairs", by, KEYS)
        self.source, self.target, self.branch, self.by = source, target, branch, by
        self.site, self.target_site = site, target_site
        self.unpaired: tuple[int, int] | None = None
        self._total = tuple(
            store.segments(name, branch=branch).total
            for store, name in ((source, site), (target, target_site))
        )
        self._check_tokens()
        self._units, self._numbers, self._prompts = self._samples()

    def __iter__(self) -> Iterator[StoredPairs]:
        held: tuple[int, _Rows] | None = None
        paired = 0
        for unit, blocks in groupby(
            self.target.blocks(self.target_site, branch=self.branch), lambda each: each.unit
        ):
            other = self._read(self.target, unit, list(blocks))
            for wanted in sorted({self._units[n] for n in other.samples if n in self._units}):
                if held is None or held[0] != wanted:
                    held = wanted, self._read(self.source, wanted, self._blocks(wanted))
                found = self._match(held[1], other)
                paired += len(found)
                if len(found):
                    yield found
        if not paired:
            raise InvalidInput(
                f"{self.source.path} and {self.target.path} have prompts and seeds in common, but "
                f"no {self.by} and token of {self.site} and {self.target_site}"
            )
        self.unpaired = self._total[0] - paired, self._total[1] - paired

    def read(self) -> StoredPairs:
        """All pairs in memory."""
        parts = list(self)
        names = ("source", "target", "groups", "steps", "sigmas")
        return StoredPairs(*(torch.cat([getattr(each, name) for each in parts]) for name in names))

    def _samples(self) -> tuple[dict[int, int], dict[tuple[str, int], int], dict[str, int]]:
        """Unit of the source by number of a sample, and the numbers by (prompt, seed)."""
        numbers: dict[tuple[str, int], int] = {}
        prompts: dict[str, int] = {}
        units = {}
        for unit in self.source.units:
            for key in _keys_of(self.source, unit):
                if key in numbers:
                    raise InvalidInput(
                        f"{self.source.path}: {key[0]!r} with seed {key[1]} is there twice, so its "
                        "rows have no one partner"
                    )
                numbers[key] = len(numbers)
                units[numbers[key]] = unit
                prompts.setdefault(key[0], len(prompts))
        others = [key for unit in self.target.units for key in _keys_of(self.target, unit)]
        if not numbers.keys() & set(others):
            common = prompts.keys() & {prompt for prompt, _ in others}
            first, other = next(iter(numbers), ("", 0)), next(iter(others), ("", 0))
            what = "no seed of a prompt" if common else "no prompts"
            raise InvalidInput(
                f"{self.source.path} and {self.target.path} have {what} in common: the first has "
                f"{first[0]!r} with seed {first[1]}, the second {other[0]!r} with seed {other[1]}"
            )
        return units, numbers, prompts

    def _blocks(self, unit: int) -> list[RowBlock]:
        every = self.source.segments(self.site, branch=self.branch)
        return list(blocks_of(of_unit(every, unit)))

    def _read(self, store: Store, unit: int, blocks: list[RowBlock]) -> "_Rows":
        own = [self._numbers.get(key, -1) for key in _keys_of(store, unit)]
        names = [prompt for prompt, _ in _keys_of(store, unit)]
        values = torch.cat([block.values for block in blocks])
        columns = {
            name: np.concatenate(
                [store.keys(block)[name].to_numpy().astype(np.float64) for block in blocks]
            )
            for name in ("sample", "step", "evaluation", "sigma", "token")
        }
        place = columns["sample"].astype(np.int64)
        keys = np.empty(len(place), _KEY)
        keys["sample"], keys["token"] = np.array(own)[place], columns["token"]
        keys["evaluation"] = columns["evaluation"]
        keys["time"] = columns["step"] if self.by == "step" else _rounded(columns["sigma"])
        group = np.array([self._prompts.get(name, -1) for name in names])[place]
        return _Rows(values, keys, set(own) - {-1}, columns["step"], columns["sigma"], group)

    def _match(self, one: "_Rows", other: "_Rows") -> StoredPairs:
        _, here, there = np.intersect1d(one.keys, other.keys, return_indices=True)
        real = one.keys["sample"][here] >= 0
        order = np.argsort(there[real])  # as the target's unit has them
        here, there = here[real][order], there[real][order]
        if self.by == "step" and not self._harvested_together():
            self._check_noise(one.sigmas[here], other.sigmas[there], other.steps[there])
        return StoredPairs(
            one.values[here],
            other.values[there],
            torch.from_numpy(other.groups[there]),
            torch.from_numpy(other.steps[there].astype(np.int64)),
            torch.from_numpy(other.sigmas[there]),
        )

    def _check_noise(self, one: np.ndarray, other: np.ndarray, steps: np.ndarray) -> None:
        apart = np.abs(one - other) > _EQUAL * np.abs(other)  # False of NaN
        if apart.any():
            n = int(np.flatnonzero(apart)[0])
            raise InvalidInput(
                f"step {steps[n]:g} has sigma {one[n]:.4g} in {self.source.path} and "
                f"{other[n]:.4g} in {self.target.path}; pair by='sigma', or harvest both with one "
                "schedule"
            )

    def _harvested_together(self) -> bool:
        """Whether one harvest has written both, so that schedules need not say noise alike."""
        one, other = (_pair_of(store) for store in (self.source, self.target))
        return one is not None and one == other

    def _check_tokens(self) -> None:
        sites = self.source.sites[self.site], self.target.sites[self.target_site]
        pools = [each.pool for each in sites]
        if pools[0] != pools[1]:
            raise InvalidInput(
                f"{self.site} is stored with pool={pools[0]} and {self.target_site} with "
                f"pool={pools[1]}; harvest both alike"
            )
        if pools[0] != "none":
            return
        grids = [each.hw for each in sites]
        if grids[0] != grids[1]:
            raise InvalidInput(
                f"{self.site} has a grid of {grids[0]} and {self.target_site} of {grids[1]}, so "
                "tokens of one number are not at one place; choose sites of one size, or harvest "
                "pool: mean"
            )
        cuts = [_tokenizers(store) for store in (self.source, self.target)]
        if grids[0] is None and cuts[0] != cuts[1]:
            raise InvalidInput(
                f"{self.site} and {self.target_site} are of models with other tokenizers, so "
                "tokens of one number do not belong together; harvest pool: mean, or record spans "
                "with record_between"
            )


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of one unit: values, keys, the samples among them, and what is told of each."""

    values: Tensor
    keys: np.ndarray
    samples: set[int]
    steps: np.ndarray
    sigmas: np.ndarray
    groups: np.ndarray


def _keys_of(store: Store, unit: int) -> list[tuple[str, int]]:
    table = store.samples(unit)
    return list(zip(table["prompt"].to_pylist(), table["seed"].to_pylist(), strict=True))


def _rounded(sigmas: np.ndarray) -> np.ndarray:
    """Equal numbers for what is equal but for the last digits."""
    with np.errstate(divide="ignore"):
        return np.round(np.log(sigmas) / _EQUAL)


def _pair_of(store: Store) -> str | None:
    """What the harvest of two subjects is called that a store is from."""
    jobs = store.manifest.jobs
    said = jobs[0].fingerprint.get("settings", {}).get("pair") if len(jobs) == 1 else None
    return None if said is None else said["both"]


def _tokenizers(store: Store) -> Any:
    jobs = store.manifest.jobs
    return {str(job.fingerprint.get("subject", {}).get("tokenizer")) for job in jobs}
