"""What adapters are trained on: prompts with a partner, a completion or a picture."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.specs.data import Item, pairs_only, read_items
from dreamreader.specs.parts import Data
from dreamreader.training.parts import Training

COMPLETION, IMAGE = "completion", "image"  # columns


@dataclass(frozen=True)
class Examples:
    """Rows to train on: prompt by prompt, and for each prompt seed by seed.

    Attributes:
        prompts: that are edited. seeds: of each prompt.
        partners: of each prompt: the teacher's prompt, the completion, or the file of the picture.
        keep: prompts that shall stay as they are.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    partners: tuple[str, ...]
    keep: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.prompts) * len(self.seeds)

    def each(self, values: Sequence[str]) -> list[str]:
        """A value of each prompt for each row."""
        return [value for value in values for _ in self.seeds]

    @property
    def row_seeds(self) -> list[int]:
        return list(self.seeds) * len(self.prompts)

    def few(self, count: int) -> "Examples":
        """The first prompts with one seed."""
        parts = {name: getattr(self, name)[:count] for name in ("prompts", "partners", "keep")}
        return replace(self, **parts, seeds=self.seeds[:1])

    def digest(self, pictures: bool) -> str:
        """SHA-256 of all that they hold; of pictures, of what is in their files."""
        digest = hashlib.sha256(repr((self.prompts, self.seeds, self.keep)).encode())
        for each in self.partners:
            digest.update(_bytes(each) if pictures else repr(each).encode())
        return digest.hexdigest()


def examples_of(
    training: Training,
    items: Sequence[Item],
    seeds: Sequence[int],
    folder: Path | None = None,
    label: str = "data",
) -> Examples:
    """The rows that a loss needs.

    Args:
        training: names the loss. items, seeds: of the spec.
        folder: what relative names of pictures are meant from.
        label: of the items, for errors.

    Raises:
        InvalidInput: a prompt has no partner of the kind that the loss needs.
    """
    if training.loss in ("activations", "noise"):
        pairs_only(items, f"{label}, for the loss {training.loss}")
        partners = [str(item.target) for item in items]
    else:
        column = COMPLETION if training.loss == "language" else IMAGE
        partners = [_column(item, column, training.loss, label) for item in items]
        if column == IMAGE:
            partners = [str((folder or Path()) / each) for each in partners]
    kept = () if training.keep is None else read_items(training.keep.data, "training.keep.data")
    prompts = tuple(item.prompt for item in items)
    return Examples(prompts, tuple(seeds), tuple(partners), tuple(item.prompt for item in kept))


def folder_of(data: Data, spec: Path | None) -> Path | None:
    """What names of pictures are meant from: the folder of the file that has them."""
    return spec if data.file is None else Path(data.file).parent


def pictures_of(files: Sequence[str]) -> Float[Tensor, "rows 3 height width"]:
    """Pictures with values from 0 to 1.

    Raises:
        InvalidInput: a file is missing or no picture, or their sizes differ.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    found: list[Tensor] = []
    for name in files:
        try:
            with Image.open(name) as picture:
                pixels = np.array(picture.convert("RGB"))
        except FileNotFoundError:
            raise InvalidInput(f"data: the picture {name} does not exist") from None
        except (UnidentifiedImageError, OSError) as error:
            raise InvalidInput(f"data: {name} is no picture: {error}") from error
        found.append(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
        if found[-1].shape != found[0].shape:
            sizes = ["{2} x {1}".format(*each.shape) for each in (found[0], found[-1])]
            raise InvalidInput(
                f"data: pictures have one size, {files[0]} is {sizes[0]} and {name} {sizes[1]}"
            )
    return torch.stack(found)


def _column(item: Item, name: str, loss: str, label: str) -> str:
    value: Any = item.columns.get(name)
    if not isinstance(value, str) or not value:
        got = f"has {', '.join(item.columns) or 'none'}" if value is None else f"got {value!r}"
        raise InvalidInput(
            f"{label}: the loss {loss} needs a column {name} with text; entry {item.id!r} {got}"
        )
    return value


def _bytes(file: str) -> bytes:
    try:
        return hashlib.sha256(Path(file).read_bytes()).digest()
    except FileNotFoundError:
        raise InvalidInput(f"data: the picture {file} does not exist") from None
