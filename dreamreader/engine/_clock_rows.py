"""How many pictures a call of a pipeline makes, and of which prompts: read from its arguments."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dreamreader.engine._families.guidance import embeds_negative_rows, makes_one_video

_EACH = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
# what stands for the prompts where none is given: the first of these that is
_GIVEN = ("prompt_embeds", "image_embeds", "class_labels")


def rows_of(own: type, arguments: Mapping[str, Any]) -> int | None:
    """Pictures or videos that the call asked for; None where its arguments do not say."""
    given = _count_given(own, arguments)
    return None if given is None else given * _each(own, arguments, given)


def prompts_of(own: type, arguments: Mapping[str, Any]) -> list[str] | None:
    """The prompt of each row: those of one prompt follow each other. None where none was given."""
    prompts = _prompts(own, arguments)
    if prompts is None or not all(isinstance(each, str) for each in prompts):
        return None
    each = _each(own, arguments, len(prompts))
    return [text for text in prompts for _ in range(each)]


def _prompts(own: type, arguments: Mapping[str, Any]) -> list[Any] | None:
    found = _list_prompts(arguments.get("prompt"))
    if found is not None and embeds_negative_rows(own):
        found += _list_prompts(arguments.get("negative_prompt")) or []
    return found


def _list_prompts(prompt: Any) -> list[Any] | None:
    if isinstance(prompt, str):
        return [prompt]
    return list(prompt) if isinstance(prompt, list | tuple) else None


def _count_given(own: type, arguments: Mapping[str, Any]) -> int | None:
    prompts = _prompts(own, arguments)
    if prompts is not None:
        return len(prompts)
    found = (arguments.get(name) for name in _GIVEN)
    return _length(next((each for each in found if each is not None), None))


def _length(given: Any) -> int | None:
    """Rows of embeddings; a list holds one tensor for each, or tensors of several rows."""
    if isinstance(given, Tensor):
        return given.shape[0] if given.dim() else 1
    if not isinstance(given, list | tuple) or not given:
        return None
    if any(isinstance(each, Tensor) and each.dim() > 2 for each in given):
        return None
    return len(given)


def _each(own: type, arguments: Mapping[str, Any], given: int) -> int:
    """Rows of one prompt, next to each other."""
    if makes_one_video(own):
        return 1
    count = next((arguments[name] for name in _EACH if arguments.get(name) is not None), 1)
    made = arguments.get("image_embeddings")  # Stable Cascade decodes what its prior made
    if isinstance(made, list):
        made = made[0] if len(made) == 1 else None
    if isinstance(made, Tensor) and given:
        count = int(count) * max(made.shape[0] // given, 1)
    return int(count)
