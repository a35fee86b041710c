"""Experiments as data: spec, plan, run folder, report."""

from dreamreader.experiments.compare import RunDifference, Verdict, diff, verify
from dreamreader.experiments.experiment import Experiment
from dreamreader.experiments.load import check_spec, load_results, load_spec
from dreamreader.experiments.methods import ExperimentSpec, Spec
from dreamreader.experiments.plan import Plan
from dreamreader.experiments.results import Results

__all__ = [
    "Experiment",
    "ExperimentSpec",
    "Plan",
    "Results",
    "RunDifference",
    "Spec",
    "Verdict",
    "check_spec",
    "diff",
    "load_results",
    "load_spec",
    "verify",
]
