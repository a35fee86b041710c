"""Causal localisation: which sites, steps, tokens and heads carry an attribute."""

from dreamreader.localise.hspace import asymmetric
from dreamreader.localise.interventions import ablate_edits, patch_edits
from dreamreader.localise.lens import Lens, lens, lens_cells
from dreamreader.localise.patching import ablate_grid, patch_grid
from dreamreader.localise.windows import text_layers, window_cells, window_grid, window_source
from dreamreader.sweep import (
    Agreement,
    Cell,
    Grid,
    grid,
    joined,
    random_cells,
    records_of,
    site_widths,
)

__all__ = [
    "Agreement",
    "Cell",
    "Grid",
    "Lens",
    "ablate_edits",
    "ablate_grid",
    "asymmetric",
    "grid",
    "joined",
    "lens",
    "lens_cells",
    "patch_edits",
    "patch_grid",
    "random_cells",
    "records_of",
    "site_widths",
    "text_layers",
    "window_cells",
    "window_grid",
    "window_source",
]
