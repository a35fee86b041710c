"""How sure a number is: intervals around it."""

from dreamreader.stats.intervals import Interval, bootstrap, wilson

__all__ = ["Interval", "bootstrap", "wilson"]
