"""What `generate` will do with a run's arguments and the model's own generation config."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dreamreader.engine._refusal import refusals
from dreamreader.engine._subject import innermost, is_encoder_decoder
from dreamreader.errors import InvalidInput

_OURS = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "encoder_outputs",
)
_POSITIONS = ("wpe", "embed_positions", "position_embeddings")  # learned: there are no more


@dataclass(frozen=True)
class Decoding:
    """How the rows of a run are generated.

    Args:
        draws: tokens are drawn, so that every row needs its own seed.
        alone: why rows go through the model one by one; None: together.
        pad: the token behind a text that ended; None where no config says it.
    """

    draws: bool
    alone: str | None
    pad: int | None


def plan_decoding(model: Any, arguments: dict[str, Any], rows: int) -> Decoding:
    """Read the config that `generate` will use: the model's own, the given one, the arguments.

    Raises:
        InvalidInput: an argument is the reader's own, does not fit several rows, or is refused by
            transformers.
    """
    check(arguments)
    if rows > 1 and arguments.get("streamer") is not None:
        raise InvalidInput("a streamer follows one row: run one prompt with one seed")
    given = {k: v for k, v in arguments.items() if k not in ("generation_config", "streamer")}
    inner: Any = innermost(model)
    if not hasattr(inner, "_prepare_generation_config"):  # another library's generate
        return Decoding(True, "tokens may be drawn from each row's seed", None)
    own = getattr(model, "generation_config", None)
    if own is not None and own is not inner.generation_config:  # that of PEFT's wrapper is used
        inner.generation_config = own
    with explain_errors():
        config, _ = inner._prepare_generation_config(arguments.get("generation_config"), **given)
        mode = str(getattr(config.get_generation_mode(given.get("assistant_model")), "value", ""))
    draws = bool(config.do_sample) or arguments.get("custom_generate") is not None  # it may draw
    why = "tokens are drawn from each row's seed" if draws else None
    if why is None and "assisted" in mode:
        why = "assisted generation takes one row at a time"
    if rows > 1 and why is not None and arguments.get("past_key_values") is not None:
        raise InvalidInput(
            f"past_key_values is one cache, and the rows are run one by one, since {why}; leave it "
            "out, or name a kind with cache_implementation="
        )
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    pads = (config.pad_token_id, *ends)
    pad = next((int(each) for each in pads if each is not None), None)
    return Decoding(draws, why, pad)


def check(arguments: dict[str, Any]) -> None:
    """Refuse arguments that the reader itself sets, and tokens to keep that are no number."""
    keep = arguments.get("logits_to_keep", 0)
    if not isinstance(keep, Tensor) and (type(keep) is not int or keep < 0):
        raise InvalidInput(
            f"logits_to_keep is a number of tokens from 0 on, or a tensor of them, got {keep!r}"
        )
    for name in _OURS:
        if name in arguments:
            raise InvalidInput(
                f"{name} is set by the reader: use prompts; with tensors of your own, call the "
                "model in a recording() or editing() block"
            )


def check_length(model: Any, tokens: int, arguments: dict[str, Any]) -> None:
    """Refuse prompts, with the tokens that are to follow, beyond a table of learned positions.

    Models that compute their positions are not held to what their config says.

    Raises:
        InvalidInput: with the model's limit and the number of tokens.
    """
    inner: Any = innermost(model)
    limit = getattr(getattr(inner, "config", None), "max_position_embeddings", None)
    new = arguments.get("max_new_tokens", 0)
    new = new if type(new) is int and not is_encoder_decoder(model) else 0
    if type(limit) is not int or tokens + max(new - 1, 0) <= limit:
        return
    tables = (name for name, each in inner.named_modules() if isinstance(each, nn.Embedding))
    if any(name.rpartition(".")[2] in _POSITIONS for name in tables):
        more = f", and max_new_tokens={new} more are asked for" if tokens <= limit else ""
        raise InvalidInput(
            f"{type(inner).__name__} has positions for {limit:,} tokens; the longest prompt has "
            f"{tokens:,}{more}. Give fewer, or cut prompts with Reader(..., max_tokens=)"
        )


def explain_errors() -> AbstractContextManager[None]:
    """Say which argument was wrong where transformers refuses it, without its traceback."""
    return refusals("generate", "transformers/generation/")
