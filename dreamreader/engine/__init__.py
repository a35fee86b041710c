"""The engine: sites, hooks, cache and firing report, driven by a `Reader`."""

from dreamreader.engine.cache import Activation, Cache, Row
from dreamreader.engine.firing import Firing, FiringReport
from dreamreader.engine.probs import Attention
from dreamreader.engine.reader import Reader, RunResult
from dreamreader.engine.request import EditRequest, Record, Request, Stream, Watch
from dreamreader.engine.selection import Box
from dreamreader.engine.sites import Site, SiteList
from dreamreader.engine.stream import Flowing
from dreamreader.engine.watch import Call

__all__ = [
    "Activation",
    "Attention",
    "Box",
    "Cache",
    "Call",
    "EditRequest",
    "Firing",
    "FiringReport",
    "Flowing",
    "Reader",
    "Record",
    "Request",
    "Row",
    "RunResult",
    "Site",
    "SiteList",
    "Stream",
    "Watch",
]
