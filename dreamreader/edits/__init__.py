"""Edits: value objects that say what to change at which sites, when and for which rows."""

from dreamreader.edits.ablate import Ablate
from dreamreader.edits.custom import Edit
from dreamreader.edits.files import Edits, load, save
from dreamreader.edits.loreft import LoReFT
from dreamreader.edits.mlp import Mlp
from dreamreader.edits.patch import Patch
from dreamreader.edits.probe_guidance import ProbeGuidance
from dreamreader.edits.simple import Clamp, Scale
from dreamreader.edits.steer import Steer
from dreamreader.edits.stitch import Donation, Stitch, StitchSource
from dreamreader.engine import Box

__all__ = [
    "Ablate",
    "Box",
    "Clamp",
    "Donation",
    "Edit",
    "Edits",
    "LoReFT",
    "Mlp",
    "Patch",
    "ProbeGuidance",
    "Scale",
    "Steer",
    "Stitch",
    "StitchSource",
    "load",
    "save",
]
