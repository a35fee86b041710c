"""Recordings for fitting: labelled rows, pairs in one or two models, a denoiser's calls."""

from dreamreader.recording.between import record_between
from dreamreader.recording.calls import Calls, record_calls
from dreamreader.recording.grids import resample_grid
from dreamreader.recording.labelled import (
    Labelled,
    joined_rows,
    mean_over_tokens,
    record_batches,
    record_labelled,
)
from dreamreader.recording.levels import convert_latents, find_timestep, mix_weights
from dreamreader.recording.pairs import Pairs, pairs_of_calls, record_pairs
from dreamreader.recording.stored import StoredPairs, StorePairs

__all__ = [
    "Calls",
    "Labelled",
    "Pairs",
    "convert_latents",
    "find_timestep",
    "StorePairs",
    "StoredPairs",
    "joined_rows",
    "mean_over_tokens",
    "mix_weights",
    "pairs_of_calls",
    "record_batches",
    "record_between",
    "record_calls",
    "record_labelled",
    "record_pairs",
    "resample_grid",
]
