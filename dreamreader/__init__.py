"""Read and change what happens inside diffusion pipelines and language models.

`import dreamreader` loads torch and nothing heavier; every name below is imported on first use.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dreamreader.edits import Ablate, Clamp, Edit, Patch, Scale, Steer
    from dreamreader.engine import Activation, Cache, Reader, Record
    from dreamreader.zoo import load

try:
    __version__ = metadata.version("dreamreader")
except metadata.PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = "0+unknown"

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
    "Edit": "edits",
    "load": "zoo",
}
_MODULES = ("edits", "engine", "errors", "ops", "steering", "zoo")

__all__ = [
    "Ablate",
    "Activation",
    "Cache",
    "Clamp",
    "Edit",
    "Patch",
    "Reader",
    "Record",
    "Scale",
    "Steer",
    "load",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"dreamreader.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"dreamreader.{name}")
    raise AttributeError(f"module 'dreamreader' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
