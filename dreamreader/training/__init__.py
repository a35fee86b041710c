"""Training from spec files: adapters, probes, autoencoders, maps; a stopped training goes on."""

from dreamreader.training.map_matrix import MapMatrixJob
from dreamreader.training.map_matrix_spec import MapMatrixSpec
from dreamreader.training.parts import ProbeTraining, Training
from dreamreader.training.probes import ProbeJob
from dreamreader.training.reft import ReftJob
from dreamreader.training.sae import SaeJob
from dreamreader.training.sae_specs import SaeSpec
from dreamreader.training.specs import ProbeSpec, ReftSpec

__all__ = [
    "MapMatrixJob",
    "MapMatrixSpec",
    "ProbeJob",
    "ProbeSpec",
    "ProbeTraining",
    "ReftJob",
    "ReftSpec",
    "SaeJob",
    "SaeSpec",
    "Training",
]
