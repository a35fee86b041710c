"""Learned edits: LoReFT and its variants, their losses and their training."""

from dreamreader.fitting import History, NonFiniteLoss, Recipe
from dreamreader.recording.calls import Calls, record_calls
from dreamreader.recording.pairs import Pairs, pairs_of_calls, record_pairs
from dreamreader.reft.adapter import Adapter
from dreamreader.reft.diffusion import Denoising, NoiseMatch, encode_images
from dreamreader.reft.fit import fit_pairs
from dreamreader.reft.language import LanguageKeep, LanguageLoss
from dreamreader.reft.losses import ActivationMatch, Batch, Loss, Together, keep_activations
from dreamreader.reft.model import Reft
from dreamreader.reft.pyreft import from_pyreft
from dreamreader.reft.sweep import sweep
from dreamreader.reft.train import train
from dreamreader.reft.variants import VARIANTS

encode_pictures = encode_images  # its earlier name

__all__ = [
    "VARIANTS",
    "ActivationMatch",
    "Adapter",
    "Batch",
    "Calls",
    "Denoising",
    "History",
    "LanguageKeep",
    "LanguageLoss",
    "Loss",
    "NoiseMatch",
    "NonFiniteLoss",
    "Pairs",
    "Recipe",
    "Reft",
    "Together",
    "encode_images",
    "encode_pictures",
    "fit_pairs",
    "from_pyreft",
    "keep_activations",
    "pairs_of_calls",
    "record_calls",
    "record_pairs",
    "sweep",
    "train",
]
