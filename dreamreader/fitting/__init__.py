"""Training: one loop, one recipe and one checkpoint for all that learns."""

from dreamreader.fitting.batches import Batches, ByStep
from dreamreader.fitting.best import Best
from dreamreader.fitting.fit import fit
from dreamreader.fitting.learner import History, NonFiniteLoss
from dreamreader.fitting.objective import Objective
from dreamreader.fitting.recipe import SCHEDULES, Recipe
from dreamreader.fitting.run import Stateful

__all__ = [
    "SCHEDULES",
    "Batches",
    "Best",
    "ByStep",
    "History",
    "NonFiniteLoss",
    "Objective",
    "Recipe",
    "Stateful",
    "fit",
]
