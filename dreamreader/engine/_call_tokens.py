"""What the arguments of a call say of its tokens: which they are, and which are padding."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dreamreader.engine._sequences import Sequence, ends
from dreamreader.engine._subject import is_encoder_decoder
from dreamreader.engine._token_layout import TokenLayout, real_tokens
from dreamreader.errors import ClockUnknown

OF_ENCODER = ("input_ids", "inputs_embeds")
OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")
_PADDING = ("input_mask", "lengths", "padding_mask", "key_padding_mask")  # as some models have it


def tokens_of(arguments: Mapping[str, Any], names: tuple[str, ...]) -> Tensor | None:
    for name in names:
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value
    return None


def sequence_of(module: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
    """The tokens [rows, tokens] or embeddings [rows, tokens, features] of a call."""
    if not is_encoder_decoder(module):
        return tokens_of(arguments, OF_ENCODER)
    given = tokens_of(arguments, OF_DECODER)
    return _labels(module, arguments) if given is None else given


def _labels(module: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
    """Labels that the decoder reads, shifted by one; those of a classifier are none."""
    labels = tokens_of(arguments, ("labels",))
    if labels is None or labels.is_floating_point() or not _shifts_labels(type(module)):
        return None
    return labels


@lru_cache(maxsize=256)
def _shifts_labels(kind: type[nn.Module]) -> bool:
    """Whether a forward makes the decoder's inputs of labels; some make them of the encoder's."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return hasattr(kind, "generate") and any(
        "shift" in each for each in getattr(code, "co_names", ())
    )


def makes_decoder_inputs(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether an encoder-decoder has to make its decoder's inputs itself, and some are padding."""
    if not is_encoder_decoder(module):
        return False
    mask, given = arguments.get("attention_mask"), tokens_of(arguments, OF_ENCODER)
    return given is not None and real_tokens(mask, len(given), 0, given.shape[1]) is not None


def source_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """What an encoder-decoder's decoder attends to: the encoder's states, or what it will read."""
    return (
        states_of(arguments) if "encoder_outputs" in arguments else tokens_of(arguments, OF_ENCODER)
    )


def states_of(arguments: Mapping[str, Any]) -> Tensor | None:
    outputs = arguments.get("encoder_outputs")
    states = outputs[0] if isinstance(outputs, tuple | list | Mapping) and outputs else None
    return states if isinstance(states, Tensor) else None


def real_of(
    module: nn.Module, arguments: Mapping[str, Any], given: Tensor, past: int
) -> Tensor | ClockUnknown | None:
    """Which tokens of a call are no padding, see `real_tokens`."""
    rows, length = given.shape[:2]
    of_decoder = is_encoder_decoder(module)
    mask = arguments.get("decoder_attention_mask" if of_decoder else "attention_mask")
    if mask is None and given is arguments.get("labels"):
        return _real_of_labels(given)
    if mask is None:
        for name in _PADDING:
            if arguments.get(name) is not None:
                return ClockUnknown(f"{name} says where padding is in a way that is not read here")
    return real_tokens(mask, rows, past, length)


def _real_of_labels(labels: Tensor) -> Tensor | ClockUnknown | None:
    """Which tokens a decoder reads whose inputs are its labels, each one place later.

    -100 has no loss and is read as padding: at a row's end it is.
    """
    real = (labels != -100).cpu()
    if bool(real.all()):
        return None
    if bool((real.long().diff(dim=1) > 0).any()):
        return ClockUnknown(
            "labels have -100 before other tokens, which the decoder reads as padding: give "
            "decoder_input_ids and decoder_attention_mask"
        )
    return torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], 1)


def beside(
    tokens: TokenLayout, encoder: TokenLayout | ClockUnknown | None
) -> TokenLayout | ClockUnknown:
    """With the encoder's tokens; where these are unknown, nothing tells the two apart."""
    if isinstance(encoder, ClockUnknown):
        return encoder
    return tokens if encoder is None else replace(tokens, encoder=encoder)


def resolve_kept(chosen: Any, length: int) -> tuple[int, ...] | None:
    """Numbers of the tokens that `logits_to_keep` leaves, indexed as models do; None for all."""
    chosen = slice(-chosen, None) if isinstance(chosen, int) else chosen
    if chosen is None:
        return None
    try:
        found = torch.arange(length)[chosen.cpu() if isinstance(chosen, Tensor) else chosen]
    except (IndexError, TypeError, ValueError):
        return None  # the model says what is wrong with it
    kept = tuple(found.tolist()) if found.dim() == 1 else None
    return None if kept == tuple(range(length)) else kept


def whole_layout(
    real: Tensor | None, rows: int, length: int, prompt: int | None = None
) -> TokenLayout:
    """A layout of one call that has all the tokens there are, `prompt` of them the prompt's."""
    prompt = length if prompt is None else prompt
    prompts = (prompt,) * rows if real is None else tuple(real[:, :prompt].sum(1).tolist())
    return TokenLayout(rows, length, (0,) * rows, real, prompts)


def layout_after(
    real: Tensor | ClockUnknown | None,
    rows: int,
    past: int,
    length: int,
    earlier: TokenLayout | ClockUnknown,
    prompts: Any,
) -> TokenLayout | ClockUnknown:
    """The layout of a call that goes on where an earlier one ended."""
    if isinstance(real, ClockUnknown):
        return real
    covers = real is not None and real.shape[1] == past + length
    if isinstance(earlier, ClockUnknown):
        return layout_behind(real, rows, past, length, None, prompts) if covers else earlier
    starts = ends(earlier)
    if covers:
        assert real is not None
        if tuple(real[:, :past].sum(1).tolist()) != starts:
            return ClockUnknown(
                "the attention mask marks other tokens of the cache as padding than the calls did "
                "that filled it"
            )
        real = _unless_all(real[:, past:])
    return TokenLayout(rows, length, starts, real, prompts)


def layout_behind(
    real: Tensor | ClockUnknown | None,
    rows: int,
    past: int,
    length: int,
    before: Sequence | None,
    prompts: ClockUnknown,
) -> TokenLayout | ClockUnknown:
    """The layout of a call behind a cache of which only its own mask tells, if there is one.

    Without a mask the model counts all that is in the cache. `before` is what is known of earlier
    calls with it, after which it was changed.
    """
    if isinstance(real, ClockUnknown):
        return real
    if real is not None and real.shape[1] == past + length:
        starts = tuple(real[:, :past].sum(1).tolist())
        return TokenLayout(rows, length, starts, _unless_all(real[:, past:]), prompts)
    padded = before is not None and not (
        isinstance(before.layout, TokenLayout)
        and ends(before.layout) == (before.total,) * before.rows
    )
    if real is not None or padded:
        return ClockUnknown(
            "the cache was filled before: which of its tokens are padding is unknown"
        )
    return TokenLayout(rows, length, (past,) * rows, None, prompts)


def _unless_all(real: Tensor) -> Tensor | None:
    return None if bool(real.all()) else real.contiguous()
