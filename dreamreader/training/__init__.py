"""Training from spec files: adapters and probes, in folders where a stopped training goes on."""

from dreamreader.training.parts import ProbeTraining, Training
from dreamreader.training.probes import ProbeJob
from dreamreader.training.reft import ReftJob
from dreamreader.training.specs import ProbeSpec, ReftSpec

__all__ = ["ProbeJob", "ProbeSpec", "ProbeTraining", "ReftJob", "ReftSpec", "Training"]
