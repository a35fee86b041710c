"""Kept for its name: the package is `dreamreader.store.export`."""

from dreamreader.store.export import export as export
