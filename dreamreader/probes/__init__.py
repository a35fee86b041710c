"""Probes: classifiers and regressors of activations, with controls, calibration and cards."""

from dreamreader.probes.calibration import brier, expected_calibration_error, temperature
from dreamreader.probes.card import Card
from dreamreader.probes.carry import map_probe
from dreamreader.probes.fit import fit
from dreamreader.probes.latent_guidance import Guided, latent_guidance
from dreamreader.probes.probe import Probe, load, save
from dreamreader.probes.stream import fit_batches

__all__ = [
    "Card",
    "Guided",
    "Probe",
    "brier",
    "expected_calibration_error",
    "fit",
    "fit_batches",
    "latent_guidance",
    "load",
    "map_probe",
    "save",
    "temperature",
]
