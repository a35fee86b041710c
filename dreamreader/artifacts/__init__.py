"""Everything that is saved: one file format, one `save` and one `load` for every kind of thing."""

from dreamreader.artifacts.hub import from_hub, push_to_hub
from dreamreader.artifacts.kinds import Artifact, import_package, load, package_of, save
from dreamreader.artifacts.values import pack, unpack

load_artifact = load  # beside dreamreader.load, which opens models

__all__ = [
    "Artifact",
    "from_hub",
    "import_package",
    "load",
    "load_artifact",
    "pack",
    "package_of",
    "push_to_hub",
    "save",
    "unpack",
]
