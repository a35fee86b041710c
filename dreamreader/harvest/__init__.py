"""Harvests: activations of many prompts, to a store on disk and from there to training.

Every name below is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dreamreader.harvest.batch import Batch
    from dreamreader.harvest.dataset import StoreDataset
    from dreamreader.harvest.harvest import Harvest
    from dreamreader.harvest.manifest import Manifest
    from dreamreader.harvest.plan import Plan
    from dreamreader.harvest.ray_engine import RayEngine
    from dreamreader.harvest.spec import Spec
    from dreamreader.harvest.store import Store

_HOME = {
    "Batch": "batch",
    "Harvest": "harvest",
    "Manifest": "manifest",
    "Plan": "plan",
    "RayEngine": "ray_engine",
    "Spec": "spec",
    "Store": "store",
    "StoreDataset": "dataset",
}

__all__ = ["Batch", "Harvest", "Manifest", "Plan", "RayEngine", "Spec", "Store", "StoreDataset"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"dreamreader.harvest.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dreamreader.harvest' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
