"""Training from spec files: adapters, probes, autoencoders; a stopped training goes on."""

from dreamreader.training.parts import ProbeTraining, Training
from dreamreader.training.probes import ProbeJob
from dreamreader.training.reft import ReftJob
from dreamreader.training.sae import SaeJob
from dreamreader.training.sae_specs import SaeSpec
from dreamreader.training.specs import ProbeSpec, ReftSpec

__all__ = [
    "ProbeJob",
    "ProbeSpec",
    "ProbeTraining",
    "ReftJob",
    "ReftSpec",
    "SaeJob",
    "SaeSpec",
    "Training",
]
