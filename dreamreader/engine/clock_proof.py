"""Whether the prompt embeddings that a denoiser gets are those of the branches it is said to run.

`encode_prompt` says which embeddings belong to the prompt and which to the negative one. Once a
run, the chunks of the denoiser's batch are compared with them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Embedding = Tensor | list[Tensor]


class Heard:
    """The embeddings of one run, by branch."""

    def __init__(self) -> None:
        self._pairs: list[dict[str, Embedding]] = []

    def keep(self, names: Sequence[str] | None, result: Any) -> None:
        """Keep what one `encode_prompt` returned for these branches, in order."""
        if not names:
            return
        values = result if isinstance(result, tuple) else (result,)
        found = [each for each in values if _is_embedding(each)]
        # pooled embeddings may stand between the two
        found = [each for each in found if _size(each) == _size(found[0])]
        pair = dict(zip(names, found, strict=False))
        if pair:
            self._pairs.append(pair)

    def owner(self, given: Any) -> str | None:
        """The branch whose very object `given` is; None where that is not known."""
        names = {name for pair in self._pairs for name, each in pair.items() if each is given}
        return names.pop() if len(names) == 1 else None

    def contradiction(self, names: tuple[str, ...], given: Any) -> str | None:
        """What is wrong about the chunks of `given` being these branches, None where nothing is.

        A chunk speaks against its name where it equals the embeddings of the other branch and not
        those of its own. Where both are the same, or other values came in between, nothing is said.
        """
        chunks = _chunks(given, len(names))
        if chunks is None:
            return None
        for pair in self._whole():
            for name, chunk in zip(names, chunks, strict=True):
                other = {"cond": "uncond", "uncond": "cond"}.get(name)
                if other is None or _same(pair[name], pair[other]) is not False:
                    continue
                if _same(chunk, pair[other]) and not _same(chunk, pair[name]):
                    return (
                        f"the part of the batch that should be {name} holds the prompt embeddings "
                        f"of {other}"
                    )
        return None

    def _whole(self) -> list[dict[str, Embedding]]:
        """Both branches of every encoder: one call told of both, or one call of each."""
        both = [pair for pair in self._pairs if len(pair) == 2]
        alone = [pair for pair in self._pairs if len(pair) == 1]
        names = {name for pair in alone for name in pair}
        if len(alone) == len(names) == 2:
            both.append({**alone[0], **alone[1]})
        return both


def _is_embedding(value: Any) -> bool:
    """Not the pooled embeddings and masks beside them, which have two dimensions."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, Tensor) and each.dim() == 2 for each in value)
    return isinstance(value, Tensor) and value.dim() >= 3 and value.is_floating_point()


def _size(value: Embedding) -> Any:
    return value.shape if isinstance(value, Tensor) else list


def _chunks(given: Any, count: int) -> Sequence[Embedding] | None:
    if isinstance(given, Tensor) and given.dim() and len(given) % count == 0:
        return given.chunk(count)
    if isinstance(given, list) and given and len(given) % count == 0:
        size = len(given) // count
        return [given[size * at : size * (at + 1)] for at in range(count)]
    return None


def _same(one: Embedding, other: Embedding) -> bool | None:
    """Whether two embeddings are equal; of the first entry only where their batches differ."""
    if isinstance(one, list) or isinstance(other, list):
        if not (isinstance(one, list) and isinstance(other, list)):
            return None
        known = [_same(a[None], b[None]) for a, b in zip(one, other, strict=False)]
        return None if None in known else all(known)
    if one.shape[1:] != other.shape[1:] or one.device != other.device:
        return False if one.dim() == other.dim() else None
    if len(one) != len(other):
        one, other = one[:1], other[:1]
    return bool(torch.equal(one, other.to(one.dtype)))
