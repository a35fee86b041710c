"""The engine: sites, hooks, cache and firing report, driven by a `Reader`."""

from dreamreader.engine.cache import Activation, Cache, Row
from dreamreader.engine.firing import Firing, FiringReport
from dreamreader.engine.reader import Reader, RunResult
from dreamreader.engine.request import Box, EditRequest, Record, Request
from dreamreader.engine.sites import Site, SiteList

__all__ = [
    "Activation",
    "Box",
    "Cache",
    "EditRequest",
    "Firing",
    "FiringReport",
    "Reader",
    "Record",
    "Request",
    "Row",
    "RunResult",
    "Site",
    "SiteList",
]
