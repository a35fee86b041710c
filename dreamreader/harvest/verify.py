"""Kept for its name: the module is `dreamreader.store.verify`."""

from dreamreader.store.verify import verify as verify
