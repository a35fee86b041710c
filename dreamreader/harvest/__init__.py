"""Harvests: the activations of many prompts, from a running model to a store on disk.

Every name below is imported on first use; `Store` and its like live in `dreamreader.store`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dreamreader.harvest.harvest import Harvest
    from dreamreader.harvest.plan import Plan
    from dreamreader.harvest.spec import Spec
    from dreamreader.jobs.ray import RayEngine
    from dreamreader.store.batch import Batch
    from dreamreader.store.dataset import StoreDataset
    from dreamreader.store.manifest import Manifest
    from dreamreader.store.store import Store

_HOME = {
    "Batch": "store.batch",
    "Harvest": "harvest.harvest",
    "Manifest": "store.manifest",
    "HarvestPlan": "harvest.plan",
    "Plan": "harvest.plan",
    "RayEngine": "jobs.ray",
    "Spec": "harvest.spec",
    "Store": "store.store",
    "StoreDataset": "store.dataset",
}

__all__ = ["Batch", "Harvest", "Manifest", "Plan", "RayEngine", "Spec", "Store", "StoreDataset"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"dreamreader.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dreamreader.harvest' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
