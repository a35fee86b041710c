"""Kept for its name: the module is `dreamreader.store.stats`."""

from dreamreader.store.stats import stats as stats
