"""Prompts of a language model as tokens: chats, special tokens, padding."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dreamreader.engine._firing import ranges
from dreamreader.engine._subject import input_device, is_encoder_decoder
from dreamreader.errors import InvalidInput


class TextReader(Protocol):
    """What a reader of a language model says of its prompts."""

    tokenizer: Any
    max_tokens: int | None
    add_special_tokens: bool

    @property
    def subject(self) -> Any: ...


class ChatText(str):
    """A chat as text. Its template has put in the special tokens, so that none are added."""


def render_chats(tokenizer: Any, prompts: Any) -> Any:
    """Prompts in which every list of messages is a text, made by the tokenizer's chat template.

    Args:
        tokenizer: of the model.
        prompts: strings, lists of `{"role": ..., "content": ...}`, or one of them.

    Raises:
        InvalidInput: the template is missing or refuses the messages, or they are no list.
    """
    if isinstance(prompts, Mapping):
        raise InvalidInput("chat messages are a list, also if there is one: [{'role': ...}]")
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return prompts
    if _is_chat(prompts):
        return _render(tokenizer, prompts)
    return [_render(tokenizer, each) if _is_chat(each) else each for each in prompts]


def _is_chat(prompt: Any) -> bool:
    listed = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return listed and any(isinstance(each, Mapping) for each in prompt)


def _render(tokenizer: Any, messages: Sequence[Any]) -> ChatText:
    from jinja2 import TemplateError

    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise InvalidInput("chat messages need a tokenizer that has a chat_template; give text")
    for number, each in enumerate(messages):
        if not isinstance(each, Mapping) or not {"role", "content"} <= each.keys():
            raise InvalidInput(f"message {number}: a role and a content are needed, got {each!r}")
    try:
        text = tokenizer.apply_chat_template(
            [dict(each) for each in messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise InvalidInput(f"the chat template refuses the messages: {error}") from error
    return ChatText(text)


def tokenize(
    reader: TextReader, prompts: Sequence[str], add_special_tokens: bool | None = None
) -> tuple[list[list[int]], list[str]]:
    """Tokens of each prompt, without padding, and notes on special tokens that were left out.

    A start or end token that a prompt has already is not added to it once more.

    Args:
        reader: of a language model.
        prompts: one for each row.
        add_special_tokens: whether those of the tokenizer are added, chats apart; as the reader
            has it by default.

    Raises:
        InvalidInput: there is no tokenizer, or a prompt has no tokens.
    """
    tokenizer = reader.tokenizer
    if tokenizer is None:
        raise InvalidInput("prompts as strings need a tokenizer: Reader(model, tokenizer)")
    wanted = reader.add_special_tokens if add_special_tokens is None else add_special_tokens
    if not isinstance(wanted, bool):
        raise InvalidInput(f"add_special_tokens is True or False, got {wanted!r}")
    added = [wanted and not isinstance(each, ChatText) for each in prompts]
    cut = {"truncation": True, "max_length": most} if (most := reader.max_tokens) else {}
    found: list[list[int]] = [[] for _ in prompts]
    for kind in set(added):
        rows = [row for row, each in enumerate(added) if each == kind]
        texts = [str(prompts[row]) for row in rows]
        every = tokenizer(texts, add_special_tokens=kind, **cut)["input_ids"]
        for row, ids in zip(rows, every, strict=True):
            found[row] = list(ids)
    twice: dict[tuple[str, str], list[int]] = {}
    for row, ids in enumerate(found):
        if not ids:
            raise InvalidInput(f"row {row}: the prompt {prompts[row]!r} has no tokens")
        for place in _drop_doubled(tokenizer, prompts[row], ids) if added[row] else ():
            twice.setdefault(place, []).append(row)
    notes = [
        f"rows {ranges(rows)}: the prompt {does} with {token!r} already, so the tokenizer's own "
        "was left out"
        for (does, token), rows in twice.items()
    ]
    return found, notes


def _drop_doubled(tokenizer: Any, prompt: str, ids: list[int]) -> list[tuple[str, str]]:
    """Take out the special tokens at both ends that the prompt's own text has already."""
    special, dropped = set(tokenizer.all_special_ids), []
    for does, end, behind in (("begins", 0, 1), ("ends", -1, -2)):
        if len(ids) < 2 or ids[end] != ids[behind] or ids[end] not in special:
            continue
        own = tokenizer(str(prompt), add_special_tokens=False)["input_ids"]
        if 0 < _repeats(own, end) < _repeats(ids, end):
            dropped.append((does, tokenizer.convert_ids_to_tokens(ids[end])))
            del ids[end]
    return dropped


def _repeats(ids: list[int], end: int) -> int:
    """How often the token at an end stands there."""
    ordered = ids if end == 0 else ids[::-1]
    return next((n for n, each in enumerate(ordered) if each != ordered[0]), len(ordered))


def pad(reader: TextReader, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Tokens and their mask, [rows, tokens], where the model's inputs go.

    Decoders are padded on the left, so that all prompts end together; encoders on the right.

    Raises:
        InvalidInput: the rows differ in length and the tokenizer has no padding token.
    """
    longest, pad = max(map(len, ids)), reader.tokenizer.pad_token_id
    if pad is None and any(len(each) < longest for each in ids):
        raise InvalidInput("several prompts need padding: set tokenizer.pad_token")
    tokens = torch.full((len(ids), longest), pad or 0)
    mask = torch.zeros_like(tokens)
    for row, each in enumerate(ids):
        right = is_encoder_decoder(reader.subject)
        where = slice(0, len(each)) if right else slice(longest - len(each), longest)
        tokens[row, where], mask[row, where] = torch.tensor(each), 1
    device = input_device(reader.subject)
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


def encoded(reader: TextReader, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Tokens of prompts and their mask, both [rows, tokens], padded as `padded` says."""
    return pad(reader, tokenize(reader, prompts)[0])


def check_lengths(reader: TextReader, prompts: Sequence[str]) -> None:
    """Refuse prompts of different lengths, where all of their tokens are read side by side.

    Raises:
        InvalidInput: padding would count among the tokens of the shorter ones.
    """
    counts = list(map(len, tokenize(reader, prompts)[0]))
    if min(counts) < max(counts):
        raise InvalidInput(
            f"tokens: the prompts have {min(counts)} to {max(counts)} tokens, and padding would "
            "count among those of the shorter ones; choose tokens that all have, such as -1, the "
            "last"
        )
