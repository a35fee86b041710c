"""Things that can be saved: each class names its kind, and a file leads back to the class."""

import os
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Self, TypeVar, overload

from torch import Tensor

from dreamreader.artifacts.file import (
    FILE,
    check_version,
    read_described,
    save_described,
    wrong_kind,
)
from dreamreader.errors import DreamreaderError, InvalidInput

_CLASSES: "dict[str, type[Artifact]]" = {}
# what a file may have imported: a package of this library, and nothing that runs on import
_PACKAGE = re.compile(r"dreamreader\.[a-z][a-z_]*")


class Artifact:
    """What a file can hold. A subclass names its kind, and with that can be saved and loaded.

    A file is safetensors: tensors by name, and in the metadata of the header plain values as JSON,
    with kind, version, and the SHA-256 of the whole file. Nothing in it can run code.

    Args:
        kind: in `class Thing(Artifact, kind="thing")`: what files call it; a name of its own.
        version: of what `to_file` gives, to be raised when `of_file` no longer reads what earlier
            versions of the class wrote.

    Raises:
        InvalidInput: another class has this kind.

    Example:
        >>> class Offset(Artifact, kind="offset"):
        ...     def __init__(self, values): self.values = values
        ...     def to_file(self): return {"values": self.values}, {}
        ...     @classmethod
        ...     def of_file(cls, tensors, content): return cls(tensors["values"])
        >>> save(Offset(torch.ones(2)), "offset.safetensors")
        >>> load("offset.safetensors").values
        tensor([1., 1.])
    """

    artifact_kind: str
    artifact_version: int

    def __init_subclass__(cls, kind: str | None = None, version: int = 1, **arguments: Any):
        super().__init_subclass__(**arguments)
        if kind is None:  # a subclass of something that can be saved already
            return
        other = _CLASSES.get(kind, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InvalidInput(
                f"kind {kind!r} is {other.__module__}.{other.__qualname__} already; name "
                f"{cls.__qualname__} otherwise"
            )
        cls.artifact_kind, cls.artifact_version = kind, version
        _CLASSES[kind] = cls

    def to_file(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Tensors by name, and plain values beside them; see `pack` for values of any nesting."""
        raise NotImplementedError

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Self:
        """What `to_file` described.

        Tensors that are not asked for are refused, and whatever is raised names the file.
        """
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file, whole or not at all; see `save`."""
        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """What `save` wrote, equal to the bit, on the CPU; see `load`."""
        return load(path, cls)


A = TypeVar("A", bound=Artifact)


def save(thing: Artifact, path: str | os.PathLike[str]) -> None:
    """Writes a thing to a file that `load` reads back equal, whole or not at all.

    Args:
        thing: directions, a probe, adapters, edits (`Edits`), a grid, a cache, word maps, ...
        path: of the file, usually with the ending .safetensors; an existing file is replaced, and
            missing folders are made.

    Raises:
        InvalidInput: it cannot be saved, or the file cannot be written.
    """
    if not isinstance(thing, Artifact):
        raise InvalidInput(
            f"{type(thing).__name__} cannot be saved; kinds are {', '.join(sorted(_CLASSES))} (of "
            "edits give dreamreader.edits.Edits([...]))"
        )
    cls = type(thing)
    tensors, content = thing.to_file()
    described = {"package": package_of(_CLASSES[cls.artifact_kind]), **content}
    save_described(path, cls.artifact_kind, tensors, described, cls.artifact_version)


@overload
def load(path: str | os.PathLike[str]) -> Any: ...
@overload
def load(path: str | os.PathLike[str], kind: type[A]) -> A: ...
def load(path: str | os.PathLike[str], kind: type[Artifact] | None = None) -> Any:
    """The thing that a file holds, of whatever kind; tensors are on the CPU.

    Args:
        path: of a file that `save` wrote, or of a folder with `artifact.safetensors`.
        kind: the class that it must be of; any where None.

    Raises:
        MissingFile, PermissionError: the file is not there (names the nearest), or not to be read.
        InvalidInput: it is damaged in any byte, of a later version, of another kind, or written by
            no class that is known here; names the file.
    """
    path = Path(path)
    if (path / FILE).is_file():
        path = path / FILE
    found, content, tensors = read_described(path)
    if found is None or (kind is not None and found != kind.artifact_kind):
        raise wrong_kind(path, "artifact" if kind is None else kind.artifact_kind, found)
    cls = class_of(path, found, content.get("package")) if kind is None else kind
    check_version(path, content, cls.artifact_version)
    asked = _Asked(tensors)
    try:
        made = cls.of_file(asked, content)
    except DreamreaderError as error:
        raise InvalidInput(f"{path}: {error}") from error
    except _MISSHAPEN as error:
        raise InvalidInput(
            f"{path} is no whole {found} ({type(error).__name__}: {error}); it was changed, or "
            "written by another program"
        ) from error
    if surplus := sorted(tensors.keys() - asked.seen):
        raise InvalidInput(f"{path}: tensors that no {found} has: {', '.join(surplus[:5])}")
    return made


# what a class raises that is given other values than it wrote
_MISSHAPEN = (
    *(KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError),
    *(RuntimeError, OverflowError, RecursionError, MemoryError),
)


class _Asked(dict[str, Tensor]):
    """Tensors of a file, which notes the ones that were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__(tensors)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise InvalidInput(f"tensor {name!r} is missing")
        self.seen.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def items(self) -> Any:
        self.seen.update(self)
        return super().items()


def import_package(package: Any) -> None:
    """Imports the package of this library that a file names, where it is one and is there."""
    if isinstance(package, str) and _PACKAGE.fullmatch(package):
        try:
            import_module(package)
        except ModuleNotFoundError:
            pass  # of a later version, or made up


def package_of(cls: type) -> str:
    """The package that `import_package` needs for a class."""
    return ".".join(cls.__module__.split(".")[:2])


def class_of(path: str | os.PathLike[str], kind: str, package: Any) -> type[Artifact]:
    """The class of a kind, from its package where it is not imported yet.

    Raises:
        InvalidInput: it is not known here.
    """
    if kind not in _CLASSES:
        import_package(package)
    if kind not in _CLASSES:
        raise InvalidInput(
            f"{path} holds {kind} of {package or 'an earlier version'}, which is not known here; "
            "import the package that has its class first, or update dreamreader"
        )
    return _CLASSES[kind]
