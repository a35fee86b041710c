"""The demo: read a colour inside an embedded model, change it, and measure what changed."""

from dreamreader.demo.plan import Plan
from dreamreader.demo.result import DemoResult
from dreamreader.demo.run import run_demo

__all__ = ["DemoResult", "Plan", "run_demo"]
