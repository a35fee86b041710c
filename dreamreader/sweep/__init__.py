"""Sweeps: cells that say where a row is changed, running them in batches, and what they gave."""

from dreamreader.sweep.axes import grid
from dreamreader.sweep.cells import Cell
from dreamreader.sweep.controls import random_cells, site_widths
from dreamreader.sweep.edges import edge_cells, matrix_cells
from dreamreader.sweep.grids import Agreement, Grid, joined
from dreamreader.sweep.run import Metric, SweepJob, job, over_cells, records_of, resolve_cells
from dreamreader.sweep.windows import layer_windows

Job = SweepJob  # its earlier name

__all__ = [
    "Agreement",
    "Cell",
    "Grid",
    "Job",
    "Metric",
    "SweepJob",
    "edge_cells",
    "grid",
    "job",
    "joined",
    "layer_windows",
    "matrix_cells",
    "over_cells",
    "random_cells",
    "records_of",
    "resolve_cells",
    "site_widths",
]
