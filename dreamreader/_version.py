"""The version of the installed package."""

from importlib import metadata

try:
    __version__ = metadata.version("dreamreader")
except metadata.PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = "0+unknown"
