"""The engine: sites, hooks, cache and firing report, driven by a `Reader`."""

from dreamreader.engine.cache import Activation, Cache, Row
from dreamreader.engine.edit_request import EditRequest
from dreamreader.engine.firing import Firing, FiringReport
from dreamreader.engine.probs import Attention
from dreamreader.engine.reader import Reader
from dreamreader.engine.request import Record, Request
from dreamreader.engine.result import RunResult
from dreamreader.engine.selection import Box
from dreamreader.engine.sites import Site, SiteList
from dreamreader.engine.stream import Flowing, Stream
from dreamreader.engine.watch import Call, Watch

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
