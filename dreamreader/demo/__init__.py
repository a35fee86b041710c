"""The demo: read a colour inside an embedded model, change it, and measure what changed."""

from dreamreader.demo.plan import Plan
from dreamreader.demo.run import Result, run_demo

__all__ = ["Plan", "Result", "run_demo"]
