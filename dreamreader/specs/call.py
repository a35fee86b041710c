"""Arguments of a subject's call that a spec may give: numbers, texts, truth values and lists.

A spec is data. It is written by one person and run by another, so what makes a library fetch or
run code, or takes objects, has no place in it.
"""

import functools
import inspect
import math
import operator
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
)

from dreamreader.errors import InvalidInput, UnknownName

_OBJECTS = (
    *("custom_generate", "trust_remote_code", "assistant_model", "assistant_tokenizer", "streamer"),
    *("generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"),
    *("custom_pipeline", "custom_revision", "watermarking_config", "compile_config"),
)  # of transformers and diffusers: they run or fetch code, or are objects


def _refuse_code(name: str) -> str:
    if name in _OBJECTS or "callback" in name:
        raise ValueError("fetches or runs code, or is an object: it cannot stand in a spec")
    return name


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be finite")
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(
            f"takes numbers, texts, truth values and lists of them, got {type(value).__name__}"
        )
    return value


CallArguments = dict[
    Annotated[str, AfterValidator(_refuse_code)], Annotated[Any, AfterValidator(_plain)]
]

Whole = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
Natural = Annotated[int, Strict(), Field(ge=0)]
Real = Annotated[float, Strict()]
Positive = Annotated[float, Strict(), Field(gt=0)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]
Yes = Annotated[bool, Strict()]
Tokens = list[Natural]


class GenerateCall(BaseModel):
    """Arguments of `generate` that are plain values, by transformers' `GenerationConfig`.

    Group beams, contrastive search, DoLa and constraints are left out: since transformers 5 they
    are code that is fetched from a hub.
    """

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: Count | None = None
    min_new_tokens: Natural | None = None
    max_length: Count | None = None
    min_length: Natural | None = None
    max_time: Positive | None = None
    stop_strings: str | list[str] | None = None
    early_stopping: Yes | Literal["never"] | None = None
    do_sample: Yes | None = None
    num_beams: Count | None = None
    num_return_sequences: Count | None = None
    temperature: Positive | None = None
    top_k: Natural | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    top_h: Share | None = None
    typical_p: Share | None = None
    epsilon_cutoff: Share | None = None
    eta_cutoff: Share | None = None
    repetition_penalty: Positive | None = None
    encoder_repetition_penalty: Positive | None = None
    length_penalty: Real | None = None
    exponential_decay_length_penalty: tuple[Natural, Real] | None = None
    no_repeat_ngram_size: Natural | None = None
    encoder_no_repeat_ngram_size: Natural | None = None
    bad_words_ids: list[Tokens] | None = None
    suppress_tokens: Tokens | None = None
    begin_suppress_tokens: Tokens | None = None
    forced_bos_token_id: Natural | None = None
    forced_eos_token_id: Natural | Tokens | None = None
    pad_token_id: Natural | None = None
    bos_token_id: Natural | None = None
    eos_token_id: Natural | Tokens | None = None
    decoder_start_token_id: Natural | Tokens | None = None
    guidance_scale: Real | None = None
    renormalize_logits: Yes | None = None
    remove_invalid_values: Yes | None = None
    use_cache: Yes | None = None
    cache_implementation: str | None = None
    prefill_chunk_size: Count | None = None
    prompt_lookup_num_tokens: Count | None = None
    max_matching_ngram_size: Count | None = None
    logits_to_keep: Natural | None = None
    add_special_tokens: Yes | None = None


_SIZES = ("height", "width", "num_inference_steps", "num_frames", "max_sequence_length")


def check_generate(pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a language model's call that a spec gives.

    Raises:
        UnknownName: `generate` has no such argument, or none that a spec may give.
        InvalidInput: a value of another type or out of range; names the field.
    """
    for name in pipeline:
        if name not in GenerateCall.model_fields:
            raise UnknownName("argument of generate", name, GenerateCall.model_fields)
    try:
        GenerateCall.model_validate(dict(pipeline))
    except ValidationError as error:
        raise _refuse(error, pipeline) from None
    return dict(pipeline)


def check_call(pipeline: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a diffusers pipeline's call that a spec gives.

    Args:
        pipeline: whose `__call__` says what it takes. given: by name.

    Raises:
        UnknownName: the call has no such argument.
        InvalidInput: it takes objects, or a value is of another type; names the field.
    """
    call = type(pipeline).__call__
    known = inspect.signature(call).parameters
    hints = _hints(call)
    for name, value in given.items():
        if name not in known:
            raise UnknownName(f"argument of {type(pipeline).__name__}", name, [*known][1:])
        kept = _plain_types(hints.get(name, Any))
        if not kept:
            raise InvalidInput(
                f"pipeline.{name}: takes objects, which a spec cannot write; leave it out"
            )
        count = name in _SIZES or name.startswith("num_images")
        kind: Any = Union[Count, None] if count else functools.reduce(operator.or_, kept, None)  # noqa: UP007
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise _refuse(error, given, name) from None
    return dict(given)


def _hints(call: Any) -> dict[str, Any]:
    try:
        return get_type_hints(call)
    except (NameError, TypeError):  # names that are imported for type checkers alone
        return {}


_STRICT = {int: Whole, float: Real, bool: Yes, str: str, type(None): None}


def _plain_types(hint: Any) -> tuple[Any, ...]:
    """The members of an annotation that YAML can write; anything, where it says nothing."""
    if hint in (Any, inspect.Parameter.empty):
        return (Any,)
    if get_origin(hint) in (Union, types.UnionType):
        kept = tuple(kind for each in get_args(hint) for kind in _plain_types(each))
        return () if kept == (None,) else kept
    if get_origin(hint) is Annotated:
        return _plain_types(get_args(hint)[0])
    if hint in (list, dict, tuple, Mapping):
        return (list if hint is tuple else hint,)
    if get_origin(hint) in (list, tuple):  # YAML has no tuples
        inner = [kind for each in get_args(hint) if each is not ... for kind in _plain_types(each)]
        return (list[tuple(inner)],) if inner else ()  # pyright: ignore
    if get_origin(hint) is dict:
        return (dict[str, Any],)
    if get_origin(hint) is Literal:
        return (hint,)
    return (_STRICT[hint],) if hint in _STRICT else ()


def _refuse(
    error: ValidationError, given: Mapping[str, Any], name: str | None = None
) -> InvalidInput:
    first = error.errors()[0]
    field = name or str(first["loc"][0])
    message = first["msg"][:1].lower() + first["msg"][1:]
    return InvalidInput(f"pipeline.{field}: {message}, got {given[field]!r}")
