"""Steering vectors: directions in a site's feature space, fitted from recorded activations."""

from dreamreader.steering.directions import Directions, load, random_like, save
from dreamreader.steering.evidence import Evidence
from dreamreader.steering.fit import fit, fit_pairs
from dreamreader.steering.fitter import Fitter
from dreamreader.steering.layers import from_layers, to_layers
from dreamreader.steering.means import LabelMeans
from dreamreader.steering.statistics import Statistics

__all__ = [
    "Directions",
    "Evidence",
    "Fitter",
    "LabelMeans",
    "Statistics",
    "fit",
    "fit_pairs",
    "from_layers",
    "load",
    "random_like",
    "save",
    "to_layers",
]
