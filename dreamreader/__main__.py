"""`python -m dreamreader` is the `dreamreader` command."""

from dreamreader.cli import main

main()
