"""Whether a language model leaves padding out, and which positions it needs for that."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dreamreader.engine._subject import (
    Subject,
    innermost,
    input_device,
    is_compiled,
    is_encoder_decoder,
    unwrap,
)
from dreamreader.errors import InvalidInput

_TOKENS = 8  # of each prompt, in the trial
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit; half types: 5 %
_NEW = 3  # tokens generated in the trial
_tried: "WeakKeyDictionary[nn.Module, dict[bool, tuple[bool, str]]]" = WeakKeyDictionary()


def position_arguments(
    subject: Subject, inputs: dict[str, Tensor], generates: bool = False
) -> dict[str, Tensor]:
    """The `position_ids` with which padding does not count, where the model needs any.

    A model that counts padding gives the shorter prompts of a batch other values than alone. Where
    neither the signature nor the kind of model tells, it is called on a few tokens with padding and
    without, once, before its first padded run.

    Args:
        subject: the language model.
        inputs: `input_ids` and `attention_mask`, [rows, tokens].
        generates: for `generate`, which makes positions itself where a signature has them.

    Raises:
        InvalidInput: the model counts padding, whatever the positions.
    """
    mask = inputs["attention_mask"]
    if bool(mask.all()):
        return {}
    model = unwrap(subject.model)
    known = _tried.setdefault(model, {})
    if generates not in known:
        known[generates] = (True, "") if _is_certain(model) else _try(subject, inputs, generates)
    needed, why = known[generates]
    if why:
        raise InvalidInput(
            f"{type(model).__name__} counts padding, so that the shorter prompts of a batch get "
            f"other values than alone ({why}); give prompts of one length, or each in its own run"
        )
    if not needed or (generates and _takes_positions(model) == "named"):
        return {}
    return {"position_ids": _positions(mask)}


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _takes_positions(model: nn.Module) -> str:
    """Whether a forward takes `position_ids`: `named`, `maybe` behind its keywords, or ``."""
    if is_encoder_decoder(model) or _has_prompt_tokens(model):
        return ""
    parameters = inspect.signature(type(innermost(model)).forward).parameters
    if "position_ids" in parameters:
        return "named"
    return "maybe" if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else ""


def _has_prompt_tokens(model: nn.Module) -> bool:
    """Whether PEFT puts learned tokens before those of the prompt: then it makes the positions."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _is_certain(model: nn.Module) -> bool:
    """Whether attention with given positions is all there is: no recurrent state, no own count."""
    inner = innermost(model)
    if _takes_positions(model) != "named" or getattr(inner, "_is_stateful", False):
        return False
    counted = (  # as RoBERTa's, which count from the number of the padding token
        each.padding_idx is not None and "position" in name
        for name, each in inner.named_modules()
        if isinstance(each, nn.Embedding)
    )
    return not any(counted)


def _try(subject: Subject, inputs: dict[str, Tensor], generates: bool) -> tuple[bool, str]:
    """(the model needs positions, why it counts padding all the same), from a few tokens."""
    model = unwrap(subject.model)
    short, batch = _sample(inputs, is_encoder_decoder(model))
    alone = {"input_ids": short[None], "attention_mask": torch.ones_like(short)[None]}
    kind = _takes_positions(model)
    options = {"named": (True, False), "maybe": (False, True)}.get(kind, (False,))
    if generates and kind == "named":
        options = (False,)  # generate makes its own
    logits, why = (_generate if generates else _forward), ""
    with _apart(subject):
        expected = logits(subject.model, alone)[-len(short) :]  # learned tokens may stand before
        for needed in options:
            extra = {"position_ids": _positions(batch["attention_mask"])} if needed else {}
            try:
                error = _error(logits(subject.model, {**batch, **extra}), expected, generates)
            except (TypeError, ValueError):  # what looked like keywords takes no positions
                continue
            if error <= _TOLERANCE.get(expected.dtype, 0.05):
                return needed, ""
            why = why or f"the logits of {len(short)} tokens differ by {error:.1%}"
    return False, why


def _sample(inputs: dict[str, Tensor], right: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """A few tokens of the shortest row, and a batch of them, padded, with a few of the longest."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    counts = mask.sum(1)
    short, long = (ids[row][mask[row]] for row in (int(counts.argmin()), int(counts.argmax())))
    more = max(1, min(len(long) - len(short), _TOKENS // 2))
    short = short[:_TOKENS]
    long = long[: len(short) + more]
    fill = ids[~mask][:1].expand(more)
    parts = [(fill, short), (torch.zeros_like(fill), torch.ones_like(short))]
    row, seen = (torch.cat(each[::-1] if right else each) for each in parts)
    batch = {
        "input_ids": torch.stack([row, long]),
        "attention_mask": torch.stack([seen, torch.ones_like(long)]),
    }
    return short, batch


def _forward(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[tokens, words] logits of the first row, those of padding on the left in front."""
    found = model(**inputs, **decoder_start(model, len(inputs["input_ids"])))
    return (found.logits if hasattr(found, "logits") else found[0])[0]


def _generate(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[new tokens, words] logits of the first row."""
    found = model.generate(
        **inputs,
        max_new_tokens=_NEW,
        min_new_tokens=_NEW,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack([each[0] for each in found.logits])


def _error(found: Tensor, expected: Tensor, generated: bool) -> float:
    """The largest difference in parts of the largest logit.

    Of generated tokens, up to the first that differs: near ties may part within rounding.
    """
    found, expected = found[-len(expected) :].float(), expected.float()
    errors = (found - expected).abs().amax(1)
    if generated:
        parted = (found.argmax(1) != expected.argmax(1)).long().cumsum(0)
        errors = errors[torch.cat([parted.new_zeros(1), parted[:-1]]) == 0]
    return float(errors.max()) / (float(expected.abs().max()) or 1.0)


def decoder_start(model: nn.Module, rows: int) -> dict[str, Tensor]:
    """The first input of an encoder-decoder's decoder, its start token; nothing for decoders.

    Raises:
        InvalidInput: no config of the model says which token that is.
    """
    if not is_encoder_decoder(model):
        return {}
    inner: Any = innermost(model)
    where = input_device(model)
    for name in ("decoder_start_token_id", "bos_token_id"):  # in the order of generate
        for config in (getattr(inner, "generation_config", None), inner.config):
            token = getattr(config, name, None)
            if token is not None:
                return {"decoder_input_ids": torch.full((rows, 1), int(token)).to(where)}
    raise InvalidInput(
        f"{type(inner).__name__} has no decoder_start_token_id in its config; give "
        "decoder_input_ids=, or arguments of generate"
    )


@contextmanager
def _apart(subject: Subject) -> Iterator[None]:
    """Calls that no edit, recording or drop-out takes part in."""
    model = subject.model
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
