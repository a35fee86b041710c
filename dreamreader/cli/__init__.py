"""The `dreamreader` command: one file per subcommand, nothing heavy imported before one runs."""

from dreamreader.cli.app import app, main

__all__ = ["app", "main"]
