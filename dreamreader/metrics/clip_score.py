"""How well pictures fit their text, as a CLIP model from a local folder sees it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput, first_line
from dreamreader.metrics.base import Column, Outputs, require_field

_BATCH = 32


@dataclass(frozen=True)
class ClipScore:
    """`max(0, 100 cos(image, text))` of CLIP's projected embeddings.

    Args:
        path: folder with a CLIPModel, its tokenizer and image processor; nothing is downloaded.
        text: column of the rows to compare the picture with.
        truncate: whether text longer than the model reads may be cut off; else it is an error.

    Raises:
        InvalidInput: the folder does not hold these, or text is missing or too long.
    """

    path: str
    text: str = "prompt"
    truncate: bool = False

    name: ClassVar[str] = "clip_score"
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        folder = Path(self.path)
        if not (folder / "config.json").is_file():
            raise InvalidInput(
                f"clip_score: {folder} holds no CLIP model (config.json); give a local folder that "
                "save_pretrained wrote, nothing is downloaded"
            )

    def measure(self, got: Outputs, reference: Outputs | None = None) -> dict[str, Column]:
        images, texts = require_field(self.name, "images", got), got.column(self.text)
        for row, each in enumerate(texts):
            if not isinstance(each, str):
                raise InvalidInput(f"clip_score: row {row} has no text in the column {self.text!r}")
        scores: Column = []
        for start in range(0, len(texts), _BATCH):
            part = slice(start, start + _BATCH)
            scores += self._scores(images[part], texts[part], start)
        return {self.name: scores}

    @torch.inference_mode()
    def _scores(self, images: Float[Tensor, "n 3 h w"], texts: list[str], first: int) -> Column:
        model, tokenizer, processor = self._parts
        tokens = self._tokens(tokenizer, texts, first, model.config.text_config)
        pixels = images.detach().float().clamp(0, 1).cpu()
        pictures = [each.mul(255).round().byte().permute(1, 2, 0).numpy() for each in pixels]
        inputs = processor(images=pictures, return_tensors="pt")
        found = model(**tokens, pixel_values=inputs["pixel_values"])
        cosines = (found.image_embeds * found.text_embeds).sum(1)
        return (100 * cosines).clamp(min=0).tolist()

    def _tokens(self, tokenizer: Any, texts: list[str], first: int, config: Any) -> Any:
        limit = config.max_position_embeddings
        lengths = [len(each) for each in tokenizer(texts, verbose=False).input_ids]
        for row, length in enumerate(lengths):
            if length > limit and not self.truncate:
                raise InvalidInput(
                    f"clip_score: the text of row {first + row} has {length} tokens, the model "
                    f"reads {limit}; truncate: true cuts it off"
                )
        return tokenizer(
            texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        """Model, tokenizer and image processor, loaded once."""
        import transformers

        # named for its back end since torchvision has one of its own
        pil = getattr(transformers, "CLIPImageProcessorPil", None)
        processor = pil or transformers.CLIPImageProcessor
        classes: list[Any] = [transformers.CLIPModel, transformers.AutoTokenizer, processor]
        try:
            model, tokenizer, images = (
                each.from_pretrained(self.path, local_files_only=True) for each in classes
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InvalidInput(f"clip_score: {self.path}: {first_line(error)}") from error
        return model.eval(), tokenizer, images
