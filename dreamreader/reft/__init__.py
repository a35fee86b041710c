"""Learned edits: LoReFT and its variants, their losses and their training."""

from dreamreader.reft.adapter import Adapter
from dreamreader.reft.model import Reft

__all__ = ["Adapter", "Reft"]
