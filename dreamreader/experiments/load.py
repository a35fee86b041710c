"""Reading experiments back: spec files (see `dreamreader.specs.load`), and run folders."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamreader.experiments.folder import RunFolder
from dreamreader.experiments.methods import Spec
from dreamreader.experiments.results import Results
from dreamreader.jobs.folder import SPEC
from dreamreader.specs import load


def load_spec(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Spec:
    """Reads the spec file of an experiment; arguments and errors are those of `specs.load`."""
    return load.load_spec(Spec, path, overrides)


def check_spec(
    content: Mapping[str, Any], source: str = "spec", folder: Path | None = None
) -> Spec:
    """Validates plain values as the spec of an experiment."""
    return load.check_spec(Spec, content, None, source, folder)


def load_results(path: str | os.PathLike[str]) -> Results:
    """Reads a complete run folder.

    Args:
        path: of the folder.

    Raises:
        InvalidInput: it is no complete run, or damaged.

    Example:
        >>> results = load_results("runs/red-to-blue")
        >>> tint = results.mean("patched", "tint")
    """
    folder = RunFolder(Path(path))
    rows, measured = folder.table()
    spec = check_spec(folder.spec(), source=str(folder.path / SPEC))
    return Results(folder, spec, rows, measured)


Results.of_folder = staticmethod(load_results)
