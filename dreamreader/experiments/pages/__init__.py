"""How the results of each method are read: its part of the report, and its lines in the terminal.

Pages know methods; methods know no pages.
"""

from importlib import import_module

from dreamreader.experiments.pages.base import MethodPage
from dreamreader.experiments.results import Results

PAGES = {
    "ablate": "chunked.AblatePage",
    "edit": "edit.EditPage",
    "guide": "guide.GuidePage",
    "heatmap": "heatmap.HeatMapPage",
    "lens": "lens.LensPage",
    "patch": "chunked.PatchingPage",
    "reft": "reft.ReftPage",
    "sae": "sae.SaePage",
    "steer": "steer.SteerPage",
    "stitch": "stitch.StitchPage",
    "transfer": "transfer.TransferPage",
    "windows": "chunked.PatchingPage",
}
"""Module and class of the page of each kind of method."""


def page_of(results: Results) -> MethodPage:
    """The page of the method of a run."""
    module, _, name = PAGES[results.spec.method.kind].partition(".")
    return getattr(import_module(f"{__name__}.{module}"), name)(results)


__all__ = ["MethodPage", "page_of"]
