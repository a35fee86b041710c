"""Kept for its name: the module is `dreamreader.store.merge`."""

from dreamreader.store.merge import merge as merge
