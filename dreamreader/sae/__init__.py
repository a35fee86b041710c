"""Sparse autoencoders: training, files of other libraries, and features that are understood."""

from dreamreader.sae.calibrate import calibrate_threshold
from dreamreader.sae.carry import map_sae
from dreamreader.sae.collect import Collected, collect_examples
from dreamreader.sae.dashboard import write_dashboard, write_neuronpedia
from dreamreader.sae.edit import SAEEdit, unlearn
from dreamreader.sae.examples import FeatureExamples, StrongestRows
from dreamreader.sae.fold import fold
from dreamreader.sae.formats import read_sae, write_sae
from dreamreader.sae.loss import AUX_RULES, AuxK, SaeLoss
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.objective import Reconstruction, ScoreCurve
from dreamreader.sae.selection import BatchTopK, JumpReLU, SampledTopK, Selection, TopK
from dreamreader.sae.threshold import THRESHOLD_RULES, ThresholdRule
from dreamreader.sae.train import train_sae

__all__ = [
    "AUX_RULES",
    "THRESHOLD_RULES",
    "AuxK",
    "BatchTopK",
    "Collected",
    "FeatureExamples",
    "JumpReLU",
    "Reconstruction",
    "SAEEdit",
    "SaeLoss",
    "SampledTopK",
    "ScoreCurve",
    "Selection",
    "SparseAutoencoder",
    "StrongestRows",
    "ThresholdRule",
    "TopK",
    "calibrate_threshold",
    "collect_examples",
    "fold",
    "map_sae",
    "read_sae",
    "train_sae",
    "unlearn",
    "write_dashboard",
    "write_neuronpedia",
    "write_sae",
]
