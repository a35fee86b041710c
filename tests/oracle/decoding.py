"""Greedy decoding by hand: no cache, every token recomputed at every turn.

A language model's step is its decoding position: the prompt is read at step 0, the i-th token that
was written is read at step i. As attention looks back only, recomputing a token gives what it gave
when it was read, so a change that belongs to a step belongs to that step's tokens for good.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# an attention output of each model
ATTENTION = {
    "gpt2": "transformer.h.1.attn.c_proj",
    "gpt-neox": "gpt_neox.layers.1.attention.dense",
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "gemma2", "gemma3"), "model.layers.1.self_attn.o_proj"
    ),
}


@dataclass(frozen=True)
class Push:
    """Adds `vector` [D] to what the module gives for the tokens of some steps, in some rows."""

    module: str
    vector: Tensor
    steps: Iterable[int]
    rows: Iterable[int] | None = None


@torch.no_grad()
def decode(
    model: Any, ids: Tensor, mask: Tensor, count: int, push: Push | None = None
) -> tuple[Tensor, Tensor]:
    """Write `count` tokens after the left-padded prompts; the end token is never chosen.

    Returns:
        The written tokens [N, count] and the logits that each was chosen by [N, count, vocabulary].
    """
    prompt = ids.shape[1]
    logits = []
    for _ in range(count):
        handle = None
        if push is not None:
            handle = model.get_submodule(push.module).register_forward_hook(
                lambda module, inputs, output: _pushed(output, prompt, push)
            )
        try:
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            result = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
        finally:
            if handle is not None:
                handle.remove()
        last = result.logits[:, -1].clone()
        last[:, model.config.eos_token_id] = -torch.inf
        logits.append(last)
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids[:, prompt:], torch.stack(logits, dim=1)


def _pushed(output: Tensor, prompt: int, push: Push) -> Tensor:
    changed = output.clone()
    rows = range(len(output)) if push.rows is None else push.rows
    for token in range(output.shape[1]):
        if max(0, token - prompt + 1) in push.steps:
            for row in rows:
                changed[row, token] += push.vector
    return changed
