"""How the results of each method are read: its part of the report, and its lines in the terminal.

Pages know methods; methods know no pages.
"""

from dreamreader.experiments.pages.base import MethodPage
from dreamreader.experiments.pages.chunked import AblatePage, PatchingPage
from dreamreader.experiments.pages.edit import EditPage
from dreamreader.experiments.pages.guide import GuidePage
from dreamreader.experiments.pages.heatmap import HeatMapPage
from dreamreader.experiments.pages.lens import LensPage
from dreamreader.experiments.pages.reft import ReftPage
from dreamreader.experiments.pages.steer import SteerPage
from dreamreader.experiments.results import Results

PAGES: dict[str, type[MethodPage]] = {
    "ablate": AblatePage,
    "edit": EditPage,
    "guide": GuidePage,
    "heatmap": HeatMapPage,
    "lens": LensPage,
    "patch": PatchingPage,
    "reft": ReftPage,
    "steer": SteerPage,
    "windows": PatchingPage,
}


def page_of(results: Results) -> MethodPage:
    """The page of the method of a run."""
    return PAGES[results.spec.method.kind](results)


__all__ = ["MethodPage", "page_of"]
