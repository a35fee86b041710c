"""The kinds of jobs. A new kind is one line here, and its subclass of `SpecJob`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamreader.errors import InvalidInput, UnknownName

if TYPE_CHECKING:
    from dreamreader.jobs.job import SpecJob


@dataclass(frozen=True)
class Kind:
    """Where a kind of job lives.

    Attributes:
        home: module and class, imported at first use. mark: the field that tells its specs from
            those of other kinds, where they do not say their kind.
    """

    home: str
    mark: str

    def load(self) -> "type[SpecJob[Any]]":
        module, _, name = self.home.partition(":")
        return getattr(import_module(module), name)


KINDS = {
    "experiment": Kind("dreamreader.experiments.experiment:Experiment", "method"),
    "harvest": Kind("dreamreader.harvest.harvest:Harvest", "capture"),
    "probes": Kind("dreamreader.training.probes:ProbeJob", "labels"),
    "sae": Kind("dreamreader.training.sae:SaeJob", "autoencoders"),
    "map-matrix": Kind("dreamreader.training.map_matrix:MapMatrixJob", "target_sites"),
    "reft": Kind("dreamreader.training.reft:ReftJob", "sites"),  # probes have sites too
}


def job_type(kind: str) -> "type[SpecJob[Any]]":
    """The class of a kind.

    Raises:
        UnknownName: there is none of this name.
    """
    if kind not in KINDS:
        raise UnknownName("kind of job", kind, KINDS)
    return KINDS[kind].load()


def kind_of(content: Mapping[str, Any], source: str) -> str:
    """The kind that a spec says, or else that one of its fields tells.

    Args:
        content: of the spec. source: its file, for messages.

    Raises:
        UnknownName, InvalidInput: it says another, or nothing tells it.
    """
    named = content.get("kind")
    if named is not None:
        if named not in KINDS:
            raise UnknownName(f"{source}: kind of job", str(named), KINDS)
        return named
    for name, kind in KINDS.items():
        if kind.mark in content:
            return name
    marks = ", ".join(f"{each.mark} ({name})" for name, each in KINDS.items())
    has = ", ".join(map(str, content)) or "nothing"
    raise InvalidInput(
        f"{source}: no kind of job is known by it. It has {has}; say kind: {', '.join(KINDS)}, or "
        f"give one of the fields {marks}"
    )


def kind_of_file(path: str | os.PathLike[str]) -> str:
    """The kind of job that a spec file is of."""
    from dreamreader.specs.load import read_content

    return kind_of(read_content(path)[0], str(path))


def kind_of_folder(path: str | os.PathLike[str]) -> str:
    """The kind of job that a folder is of.

    Raises:
        InvalidInput: there is no such folder, or no job was begun in it.
    """
    from dreamreader.jobs.folder import FINGERPRINT, JobFolder

    folder = Path(path)
    if not folder.is_dir():
        raise InvalidInput(f"{folder}: no such run folder")
    if (folder / "manifest.json").is_file():  # of a store
        return "harvest"
    taken = JobFolder(folder).read(FINGERPRINT)
    if taken is None:
        raise InvalidInput(
            f"{folder} is no run folder: it has neither {FINGERPRINT} nor manifest.json"
        )
    return kind_of(taken["settings"]["spec"], str(folder))


def list_jobs(path: str | os.PathLike[str]) -> list[tuple[str, str, str, str]]:
    """Name, kind, short fingerprint and state of the folders of jobs in a folder.

    Raises:
        InvalidInput: there is no such folder.
    """
    from dreamreader.jobs.folder import IDENTITIES

    folder, found = Path(path), []
    if not folder.is_dir():
        raise InvalidInput(f"{folder}: no such folder")
    for each in sorted(folder.iterdir()):
        if not any((each / name).is_file() for name in IDENTITIES):
            continue
        try:
            kind = kind_of_folder(each)
            inner = job_type(kind).folder_type(each)
            found.append((each.name, kind, inner.label(), inner.state()))
        except InvalidInput as error:
            found.append((each.name, "?", "", f"damaged: {error}"))
    return found
