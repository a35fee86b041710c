"""Read and change what happens inside diffusion pipelines and language models.

`import dreamreader` loads torch and nothing heavier; every name below is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dreamreader._version import __version__ as __version__

if TYPE_CHECKING:
    from dreamreader.artifacts import from_hub, load_artifact, push_to_hub, save
    from dreamreader.edits import (
        Ablate,
        Clamp,
        Edit,
        LoReFT,
        Patch,
        ProbeGuidance,
        Scale,
        Steer,
    )
    from dreamreader.engine import Activation, Cache, Reader, Record
    from dreamreader.experiments import Experiment
    from dreamreader.harvest import Harvest
    from dreamreader.zoo import load


_HOME = {
    "Reader": "engine",
    "Record": "engine",
    "Cache": "engine",
    "Activation": "engine",
    "Steer": "edits",
    "Ablate": "edits",
    "Scale": "edits",
    "Clamp": "edits",
    "Patch": "edits",
    "ProbeGuidance": "edits",
    "Edit": "edits",
    "LoReFT": "edits",
    "Experiment": "experiments",
    "Harvest": "harvest",
    "load": "zoo",
    "save": "artifacts",
    "load_artifact": "artifacts",
    "push_to_hub": "artifacts",
    "from_hub": "artifacts",
}
_MODULES = (
    "artifacts",
    "attention",
    "edits",
    "engine",
    "errors",
    "experiments",
    "fitting",
    "harvest",
    "localise",
    "mapping",
    "metrics",
    "ops",
    "probes",
    "recording",
    "reft",
    "sae",
    "stats",
    "steering",
    "store",
    "sweep",
    "training",
    "zoo",
)

__all__ = [
    "Ablate",
    "Activation",
    "Cache",
    "Clamp",
    "Edit",
    "Experiment",
    "Harvest",
    "LoReFT",
    "Patch",
    "ProbeGuidance",
    "Reader",
    "Record",
    "Scale",
    "Steer",
    "from_hub",
    "load",
    "load_artifact",
    "push_to_hub",
    "save",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"dreamreader.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"dreamreader.{name}")
    raise AttributeError(f"module 'dreamreader' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
