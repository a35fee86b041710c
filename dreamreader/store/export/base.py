"""What all formats have in common: the rows that are chosen, and dtypes that others know."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader._progress import ProgressCallback, ProgressEvent
from dreamreader.store.layout import SiteLayout, file_of
from dreamreader.store.rows import RowBlock, Segments, blocks_of
from dreamreader.store.store import Store

KEPT = {torch.float32: np.float32, torch.float16: np.float16}  # all others become float32


@dataclass(frozen=True)
class ChosenRows:
    """Rows of a store.

    Attributes:
        store, sites, steps, branch: see `export`. report: hears of the rows.
    """

    store: Store
    sites: Sequence[str]
    steps: Any
    branch: str | Sequence[str] | None
    report: ProgressCallback
    _done: list[int] = field(default_factory=lambda: [0])

    @cached_property
    def total(self) -> int:
        """Rows of all sites."""
        return sum(self.segments(site).total for site in self.sites)

    def count(self, rows: int) -> None:
        """Reports rows that were written."""
        self._done[0] += rows
        self.report(ProgressEvent("rows", self._done[0], self.total))

    def segments(self, site: str) -> Segments:
        """Where the chosen rows of a site are."""
        return self.store.segments(site, self.steps, self.branch)

    def blocks(self, site: str, rows: int | None = None) -> Iterator[RowBlock]:
        """The chosen rows of a site, a block at a time."""
        for block in blocks_of(self.segments(site), rows):
            yield block
            self.count(len(block))


def name_of(site: str) -> str:
    """What files of a site are called."""
    return file_of(site).removesuffix(".safetensors")


def dtype_of(site: SiteLayout) -> np.dtype:
    """In which dtype the rows of a site are exported."""
    return np.dtype(KEPT.get(site.stored, np.float32))


def array_of(values: Float[Tensor, "rows width"]) -> np.ndarray:
    """Rows as numpy has them."""
    return (values if values.dtype in KEPT else values.float()).numpy()
