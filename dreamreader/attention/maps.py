"""The result: heat maps with the rows, words and steps they belong to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamreader.artifacts import Artifact, pack, unpack
from dreamreader.attention import scores
from dreamreader.attention.pictures import draw, table
from dreamreader.engine import Firing, FiringReport, Row
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.report.heat import overlay, resize

ROWS, WORDS = 8, 12  # shown in a notebook


@dataclass(frozen=True, eq=False)
class WordMaps(Artifact, kind="word_maps"):
    """Heat maps of words, one for each row and word.

    Attributes:
        maps: [rows, words, height, width] float32, at least 0, on the CPU; where asked for with a
            `steps` axis after words, and a `layers` or `heads` axis after that. NaN where a row
            has fewer words than others.
        axes: names of the dimensions.
        rows: number, prompt and seed of each row.
        words: of each row, in the order of the maps.
        sites: the attentions that took part. heads: (site, number) along the axis of heads.
        steps: the denoising steps that took part.
        images: pictures of the run, where `word_maps` ran it. firing: its report.
    """

    maps: Float[Tensor, "rows words *axes h w"]
    axes: tuple[str, ...]
    rows: tuple[Row, ...]
    words: tuple[tuple[str, ...], ...]
    sites: tuple[str, ...]
    heads: tuple[tuple[str, int], ...]
    steps: tuple[int, ...]
    images: Any = None
    firing: FiringReport | None = None

    def __post_init__(self):
        rows = {len(self.rows), len(self.words), len(self.maps)}
        if self.maps.dim() != len(self.axes) or self.maps.dim() < 4 or len(rows) != 1:
            raise InvalidInput(
                f"WordMaps: axes {', '.join(self.axes)}, {len(self.rows)} rows and words of "
                f"{len(self.words)}, but maps are {list(self.maps.shape)}"
            )

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Fields as they are; pictures of PIL as their pixels.

        Raises:
            InvalidInput: the pictures are no tensors and no RGB or grey pictures of PIL.
        """
        tensors: dict[str, Tensor] = {}
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values |= {"images": _pixels(self.images), "firing": None}
        if self.firing is not None:
            values["firing"] = (self.firing.firings, self.firing.notes)
        return tensors, {"maps": pack(values, tensors, _SAVED)}

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Self:
        values = unpack(content["maps"], tensors, _SAVED)
        values["images"] = _pictures(values["images"])
        if values["firing"] is not None:
            firings, notes = values["firing"]
            counted = ("steps", "branches", "not_computed")
            values["firing"] = FiringReport(
                [replace(e, **{n: Counter(getattr(e, n)) for n in counted}) for e in firings], notes
            )
        return cls(**values)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the maps."""
        return self.maps.shape[-2], self.maps.shape[-1]

    def of(self, word: str) -> Float[Tensor, "rows *axes h w"]:
        """The maps of one word, in every row.

        Raises:
            UnknownName: a row does not have it; names row and prompt.
        """
        return torch.stack([self.maps[n, self._at(n, word)] for n in range(len(self.rows))])

    def upsampled(self, size: int | tuple[int, int]) -> "WordMaps":
        """The maps at another size (height, width), bicubic and clamped at 0."""
        wanted = (size, size) if isinstance(size, int) else size
        return replace(self, maps=resize(self.maps, wanted))

    def iou(
        self, masks: Bool[Tensor, "rows h w"], threshold: float | str = 0.4
    ) -> Float[Tensor, "rows words *axes"]:
        """Overlap of every map with its row's mask, at the size of the masks; see `iou`."""
        return scores.iou(self._at_size_of(masks), masks, threshold)

    def pointing(self, masks: Bool[Tensor, "rows h w"]) -> Float[Tensor, "rows words *axes"]:
        """Whether the highest pixel of every map lies in its row's mask; see `pointing`."""
        return scores.pointing(self._at_size_of(masks), masks)

    def overlay(
        self, images: Any = None, words: Sequence[str] | None = None, strength: float = 0.7
    ) -> list[list[Any]]:
        """Pictures under their heat maps, for each row one of each word (PIL).

        Args:
            images: PIL pictures, or a tensor [rows, 3, h, w] in [0, 1]; those of the run where
                None. words: all of a row where None. strength: of the colour at the maximum.
        """
        images = self.images if images is None else images
        if images is None or len(images) != len(self.rows):
            got = "none" if images is None else str(len(images))
            raise InvalidInput(f"overlay: {len(self.rows)} pictures are needed, got {got}")
        found = []
        for number, own in enumerate(self.words):
            shown = own if words is None else words
            heats = [self._flat()[number, self._at(number, word)] for word in shown]
            found.append([overlay(images[number], heat, strength) for heat in heats])
        return found

    def _at(self, number: int, word: str) -> int:
        known = [each.lower() for each in self.words[number]]
        if word.lower() not in known:
            row = self.rows[number]
            raise UnknownName("word", word, known, f"Row {row.index}: {row.prompt!r}")
        return known.index(word.lower())

    def _at_size_of(self, masks: Tensor) -> Tensor:
        return resize(self.maps, (masks.shape[-2], masks.shape[-1]))

    def _flat(self) -> Float[Tensor, "rows words h w"]:
        """Without the axes in between: their mean."""
        return self.maps.mean(tuple(range(2, self.maps.dim() - 2))) if self.extra else self.maps

    @property
    def extra(self) -> tuple[str, ...]:
        """The axes between words and height."""
        return self.axes[2:-2]

    def __repr__(self) -> str:
        shape = ", ".join(
            f"{name} {size}" for name, size in zip(self.axes, self.maps.shape, strict=True)
        )
        lines = [f"WordMaps [{shape}] of {len(self.sites)} sites, {len(self.steps)} steps"]
        for row, words in list(zip(self.rows, self.words, strict=True))[:10]:
            lines.append(f"row {row.index} (seed {row.seed}): {', '.join(words)}")
        if len(self.rows) > 10:
            lines.append(f"... and {len(self.rows) - 10} more rows")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        lines = []
        for number, row in enumerate(self.rows[:ROWS]):
            words = self.words[number][:WORDS]
            image = None if self.images is None else self.images[number]
            heats = self._flat()[number, : len(words)]
            cells = [(word, draw(heat, image)) for word, heat in zip(words, heats, strict=True)]
            lines.append((f"{row.index}: {row.prompt or ''} (seed {row.seed})", cells))
        text = f"attention to words, {self.size[0]} x {self.size[1]}, {len(self.sites)} sites"
        if len(self.rows) > ROWS or any(len(each) > WORDS for each in self.words):
            text += f"; the first {ROWS} rows and {WORDS} words are shown"
        return table(text, lines)


_SAVED = {"Firing": Firing, "Row": Row}


def _pixels(images: Any) -> Any:
    """Pictures as tensors: those of PIL as (uint8 [h, w, 3] or [h, w], ...)."""
    if images is None or isinstance(images, Tensor):
        return images
    if any(getattr(each, "mode", "") not in ("RGB", "L") for each in images):
        kinds = sorted({f"{type(e).__name__} {getattr(e, 'mode', '')}".strip() for e in images})
        raise InvalidInput(
            f"pictures cannot be saved as {', '.join(kinds)}; use replace(maps, images=None), or "
            "RGB pictures of PIL"
        )
    return tuple(torch.from_numpy(np.array(each)) for each in images)


def _pictures(pixels: Any) -> Any:
    """What `_pixels` was given."""
    if pixels is None or isinstance(pixels, Tensor):
        return pixels
    from PIL import Image

    return [Image.fromarray(each.numpy()) for each in pixels]
