"""Stores: the activations of many prompts on disk, and everything that reads them.

Every name below is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dreamreader.store.batch import Batch
    from dreamreader.store.dataset import StoreDataset
    from dreamreader.store.manifest import Manifest
    from dreamreader.store.store import Store

_HOME = {"Batch": "batch", "Manifest": "manifest", "Store": "store", "StoreDataset": "dataset"}

__all__ = ["Batch", "Manifest", "Store", "StoreDataset"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"dreamreader.store.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dreamreader.store' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
