"""Maps from the activations of one model to those of another: fitting, measuring, using them."""

from dreamreader.mapping.base import ActivationMap, MapCard
from dreamreader.mapping.controls import MapControl
from dreamreader.mapping.fit import METHODS, fit_map
from dreamreader.mapping.local import LocalMap
from dreamreader.mapping.lock_step import LockStep, lock_step
from dreamreader.mapping.maps import AffineMap, MLPMap
from dreamreader.mapping.matrix import MomentMatrix, correlate_success
from dreamreader.mapping.moments import CrossMoments
from dreamreader.mapping.rows import PairedRows
from dreamreader.mapping.scores import MapReport, compare_maps, score_map
from dreamreader.mapping.stitch import stitch
from dreamreader.mapping.store_site import StoreSite
from dreamreader.mapping.timed import NoiseConditionedMap, StepMaps
from dreamreader.mapping.transfer import map_direction, map_loreft, map_mlp

__all__ = [
    "METHODS",
    "ActivationMap",
    "AffineMap",
    "CrossMoments",
    "LocalMap",
    "LockStep",
    "MLPMap",
    "MapCard",
    "MapControl",
    "MapReport",
    "MomentMatrix",
    "NoiseConditionedMap",
    "PairedRows",
    "StepMaps",
    "StoreSite",
    "compare_maps",
    "correlate_success",
    "fit_map",
    "lock_step",
    "map_direction",
    "map_loreft",
    "map_mlp",
    "score_map",
    "stitch",
]
