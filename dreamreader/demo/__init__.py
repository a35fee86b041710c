"""The demo: read a colour inside an embedded model, change it, and measure what changed."""

from dreamreader.demo.plan import DemoPlan
from dreamreader.demo.result import DemoResult
from dreamreader.demo.run import run_demo

Plan, Result = DemoPlan, DemoResult  # their earlier names

__all__ = ["DemoPlan", "DemoResult", "Plan", "Result", "run_demo"]
