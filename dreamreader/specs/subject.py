"""The subject of a spec: opened, with the arguments of its call."""

import inspect
from collections.abc import Mapping
from typing import Any

from dreamreader.engine import Reader, innermost
from dreamreader.specs.call import check_call, check_generate
from dreamreader.specs.parts import Subject


def open_subject(subject: Subject) -> Reader:
    """A reader of the named model, in the dtype and on the device that the spec says."""
    from dreamreader.zoo import load

    return load(subject.model, subject.device, subject.dtype, subject.adapter)


def with_padding(reader: Reader) -> Reader:
    """The reader, whose language model pads with its end-of-text where it has no padding.

    Padding is masked: it never shows in what a row gives.
    """
    tokenizer = reader.tokenizer
    if is_language(reader) and tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return reader


def is_language(reader: Reader) -> bool:
    """Whether the subject is a language model, no pipeline."""
    return not hasattr(reader.subject, "components")


def call_settings(reader: Reader, subject: Subject, pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the subject's call: those of the embedded models, then the spec's.

    Raises:
        InvalidInput, UnknownName: the call does not take an argument, or not from a spec.
    """
    from dreamreader.zoo import MODELS, settings

    if is_language(reader):
        return check_generate(pipeline)
    own = check_call(reader.subject, pipeline)
    return settings(**own) if subject.model in MODELS else own


def forward_settings(reader: Reader) -> dict[str, Any]:
    """Arguments of a call that reads prompts of a language model and writes nothing.

    Logits of the last position alone: those of all positions may take more than all else.
    """
    known = inspect.signature(type(innermost(reader.subject)).forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def steps_of(reader: Reader, settings: Mapping[str, Any]) -> int | None:
    """Denoising steps of a run with these arguments; None for a language model."""
    if is_language(reader):
        return None
    named = settings.get("num_inference_steps")
    if named is None:
        call = inspect.signature(type(reader.subject).__call__)
        named = call.parameters["num_inference_steps"].default
    return int(named)
