"""How sure a number is: intervals, tests, corrections for many tests, and agreement of orders."""

from dreamreader.stats.corrections import benjamini_hochberg, holm
from dreamreader.stats.intervals import Interval, bootstrap, wilson
from dreamreader.stats.permutation import sign_flip
from dreamreader.stats.ranks import kendall, ranks, spearman
from dreamreader.stats.ratios import ratio_of_means

__all__ = [
    "Interval",
    "benjamini_hochberg",
    "bootstrap",
    "holm",
    "kendall",
    "ranks",
    "ratio_of_means",
    "sign_flip",
    "spearman",
    "wilson",
]
