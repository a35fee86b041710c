"""Whether a language model leaves padding out, and which positions it needs for that."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dreamreader.engine.subject import innermost, is_compiled, is_encoder_decoder
from dreamreader.errors import InvalidInput

if TYPE_CHECKING:
    from dreamreader.engine.reader import Reader

_TOKENS = 8  # of each prompt, in the trial
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit; half types: 5 %
_tried: "WeakKeyDictionary[nn.Module, tuple[bool, str]]" = WeakKeyDictionary()


def position_arguments(
    reader: "Reader", inputs: dict[str, Tensor], generates: bool = False
) -> dict[str, Tensor]:
    """The `position_ids` with which padding does not count, where the model needs any.

    A model that counts padding gives the shorter prompts of a batch other values than alone. So
    the first batch of each model with padding is tried: a few tokens with padding and without.

    Args:
        reader: of the language model.
        inputs: `input_ids` and `attention_mask`, [rows, tokens].
        generates: for `generate`, which makes positions itself where the model's signature has them.

    Raises:
        InvalidInput: the model counts padding, whatever the positions.
    """
    mask = inputs["attention_mask"]
    if bool(mask.all()):
        return {}
    model = innermost(reader.subject)
    if model not in _tried:
        _tried[model] = _try(reader, inputs)
    needed, why = _tried[model]
    if why:
        raise InvalidInput(
            f"{type(model).__name__} counts padding, so that the shorter prompts of a batch get "
            f"other values than alone ({why}); give prompts of one length, or run them one by one"
        )
    if not needed or (generates and _takes_positions(model) == "named"):
        return {}
    return {"position_ids": _positions(mask)}


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _takes_positions(model: nn.Module) -> str:
    """Whether a forward takes `position_ids`: `named`, `maybe` behind its keywords, or ``."""
    parameters = inspect.signature(type(model).forward).parameters
    if "position_ids" in parameters:
        return "named"
    return "maybe" if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else ""


def _try(reader: "Reader", inputs: dict[str, Tensor]) -> tuple[bool, str]:
    """(the model needs positions, why it counts padding all the same), from a few tokens."""
    model = innermost(reader.subject)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    short = ids[int(mask.sum(1).argmin())][mask[int(mask.sum(1).argmin())]][:_TOKENS]
    long = ids[int(mask.sum(1).argmax())][mask[int(mask.sum(1).argmax())]]
    long = long[: len(short) + max(1, min(len(long) - len(short), _TOKENS // 2))]
    fill = ids[~mask][:1].expand(len(long) - len(short))
    one = torch.ones_like(short)
    parts = [(fill, short), (torch.zeros_like(fill), one)]
    if is_encoder_decoder(model):
        parts = [(b, a) for a, b in parts]
    row, seen = (torch.cat(each) for each in parts)
    batch = {
        "input_ids": torch.stack([row, long]),
        "attention_mask": torch.stack([seen, torch.ones_like(long)]),
    }
    kind = "" if is_encoder_decoder(model) else _takes_positions(model)
    options = {"named": (True, False), "maybe": (False, True)}.get(kind, (False,))
    worst = ""
    with _apart(reader):
        alone = _logits(reader.subject, {"input_ids": short[None], "attention_mask": one[None]})[0]
        for needed in options:
            extra = {"position_ids": _positions(batch["attention_mask"])} if needed else {}
            try:
                both = _logits(reader.subject, {**batch, **extra})[0, -len(alone) :]
            except TypeError:  # what looked like keywords of the model takes no positions
                continue
            scale = float(alone.abs().max())
            error = float((both - alone).abs().max()) / (scale or 1.0)
            if error <= _TOLERANCE.get(alone.dtype, 0.05):
                return needed, ""
            worst = worst or f"the logits of {len(short)} tokens differ by {error:.1%}"
    return False, worst


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found = model(**inputs, **decoder_start(model, len(inputs["input_ids"])))
    return found.logits if hasattr(found, "logits") else found[0]


def decoder_start(model: nn.Module, rows: int) -> dict[str, Tensor]:
    """The first input of an encoder-decoder's decoder, its start token; nothing for decoders.

    Raises:
        InvalidInput: neither of the model's configs says which token that is.
    """
    if not is_encoder_decoder(model):
        return {}
    from dreamreader.engine.subject import input_device

    inner: Any = innermost(model)
    for config in (getattr(inner, "generation_config", None), inner.config):
        token = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            start = torch.full((rows, 1), int(token), device=input_device(model))
            return {"decoder_input_ids": start}
    raise InvalidInput(
        f"{type(inner).__name__} has no decoder_start_token_id in its config; give "
        "decoder_input_ids=, or arguments of generate"
    )


@contextmanager
def _apart(reader: "Reader") -> Iterator[None]:
    """Calls that no edit, recording or drop-out takes part in."""
    subject, model = reader._subject, reader.subject
    training = [each for each in model.modules() if each.training]
    paused, subject.paused = subject.paused, True
    with ExitStack() as stack:
        if any(map(is_compiled, model.modules())):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        for each in training:
            each.training = False
        try:
            yield
        finally:
            subject.paused = paused
            for each in training:
                each.training = True
