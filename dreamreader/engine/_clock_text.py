"""Whose prompt a text encoder is reading."""

from collections.abc import Mapping
from typing import Any

from dreamreader.engine._families.guidance import encodes_prompt_first
from dreamreader.errors import ClockUnknown


class Encoding:
    """One run of `encode_prompt`: each text encoder is called for these branches in this order.

    `embedded` are the branches of the embeddings that it returns, in order.
    """

    def __init__(self, names: tuple[str, ...] | None, embedded: tuple[str, ...] | None = None):
        self.names = names
        self.embedded = embedded
        self.calls: dict[str, int] = {}

    def next_of(self, encoder: str) -> tuple[str, ...] | ClockUnknown:
        """Branch of the next call of this encoder."""
        if self.names is None:
            return ClockUnknown(f"encode_prompt does not say for which branch it calls {encoder}")
        turn = self.calls.get(encoder, 0)
        self.calls[encoder] = turn + 1
        if turn >= len(self.names):
            return ClockUnknown(
                f"{encoder} was called {turn + 1} times in one encode_prompt, which encodes for "
                f"{', '.join(self.names) or 'no branch'}"
            )
        return (self.names[turn],)


def encoder_calls(
    own: type, arguments: Mapping[str, Any], run: Mapping[str, Any] | None
) -> tuple[str, ...] | None:
    """Branches that one `encode_prompt` runs each of its text encoders for, in order.

    None when that is not known. Families that encode both prompts in one go do the prompt first,
    and skip each whose embeddings are given. Pipelines that call it once per branch are told apart
    by which of the run's two prompts they hand over.
    """
    if "do_classifier_free_guidance" in arguments:
        if not encodes_prompt_first(own):
            return None
        names: tuple[str, ...] = ("cond",) if arguments.get("prompt_embeds") is None else ()
        negative = arguments.get("negative_prompt_embeds") is None
        if arguments["do_classifier_free_guidance"] and negative:
            names = (*names, "uncond")
        return names
    if run is None or arguments.get("prompt") is None:
        return None
    given = arguments["prompt"]
    positive = given is run.get("prompt") or given == run.get("prompt")
    negative = given is run.get("negative_prompt") or given == run.get("negative_prompt")
    if positive == negative:
        return None
    return ("cond",) if positive else ("uncond",)


def embedded_branches(
    own: type, arguments: Mapping[str, Any], run: Mapping[str, Any] | None
) -> tuple[str, ...] | None:
    """Branches of the prompt embeddings that one `encode_prompt` returns, in order.

    None when that is not known.
    """
    if "do_classifier_free_guidance" in arguments:
        return ("cond", "uncond") if encodes_prompt_first(own) else None
    given = arguments.get("prompt_embeds")
    if given is None:
        return encoder_calls(own, arguments, run)
    named = {"cond": "prompt_embeds", "uncond": "negative_prompt_embeds"}
    found = [branch for branch, name in named.items() if run and run.get(name) is given]
    return (found[0],) if len(found) == 1 else None
