"""Whether the prompt embeddings that a denoiser gets are those of the branches it is said to run.

`encode_prompt` says which embeddings belong to the prompt and which to the negative one, and so
does the first call of a run. The chunks of the denoiser's batch are compared with them whenever a
call gets others than the calls before, which a callback may see to at any step.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Embedding = Tensor | list[Tensor]
_ARGUMENTS = {"cond": "image_embeds", "uncond": "negative_image_embeds"}  # decoders of Kandinsky


class Heard:
    """The embeddings of one run, by branch.

    They are those of `encode_prompt` or of the call's own arguments, and those of the first calls.
    Values are copied: a callback may write into the tensors of a run.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._objects: list[tuple[str, Embedding]] = []
        self._pairs: list[dict[str, Embedding]] = []
        self._first: dict[str, dict[str, Embedding]] = {}
        self._agreed: deque[tuple[tuple[str, ...], tuple, Any]] = deque(maxlen=8)
        given = {name: arguments.get(argument) for name, argument in _ARGUMENTS.items()}
        if all(isinstance(each, Tensor) for each in given.values()):
            self._pairs.append({name: _copy(each) for name, each in given.items()})

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
            self._objects += pair.items()
            self._pairs.append({name: _copy(each) for name, each in pair.items()})

    def owners(self, given: Any) -> set[str]:
        """The branches whose very object `given` is; both where they were given the same one."""
        return {name for name, each in self._objects if each is given}

    def branch_of(self, given: Any) -> str | None:
        """The branch whose embeddings the whole of `given` is; None where it is not one of them."""
        owners = self.owners(given)
        if len(owners) == 1:
            return owners.pop()
        if owners or not (isinstance(given, Tensor) or _is_embedding(given)):
            return None
        found = {
            name
            for pair in self._whole()
            for name, each in pair.items()
            if len(each) == len(given) and _same(each, given)
        }
        return found.pop() if len(found) == 1 else None

    def contradiction(
        self, names: tuple[str, ...], given: Any, whose: str = "denoiser"
    ) -> str | None:
        """What is wrong about the chunks of `given` being these branches, None where nothing is.

        A chunk speaks against its name where it equals the embeddings of the other branch and not
        those of its own. Where both are the same, or other values came in between, nothing is said.
        First calls are those of `whose` module, as each may be given another form of them.
        """
        owners = self.owners(given)
        if len(names) == len(owners) == 1 and {*names} | owners == {"cond", "uncond"}:
            return _contradicts(*names, *owners)
        mark = _mark(given)
        if mark is not None and any(names == own and mark == at for own, at, _ in self._agreed):
            return None
        chunks = _chunks(given, len(names))
        if chunks is None:
            return None
        first = self._first.setdefault(whose, {})
        for pair in (*self._whole(), *([first] if {"cond", "uncond"} <= first.keys() else [])):
            for name, chunk in zip(names, chunks, strict=True):
                other = {"cond": "uncond", "uncond": "cond"}.get(name)
                if other is None or _same(pair[name], pair[other]) is not False:
                    continue
                if _same(chunk, pair[other]) and not _same(chunk, pair[name]):
                    return _contradicts(name, other)
        for name, chunk in zip(names, chunks, strict=True):
            if name not in first:
                first[name] = _copy(chunk)
        if mark is not None:
            self._agreed.append((names, mark, given))  # held, so that no other takes its place
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


def _contradicts(name: str, other: str) -> str:
    return f"what should be {name} holds the prompt embeddings of {other}"


def _copy(value: Any) -> Any:
    return [each.clone() for each in value] if isinstance(value, list) else value.clone()


def _mark(given: Any) -> tuple | None:
    """Where embeddings lie and how often they were written; None where that is not known."""
    if isinstance(given, list):
        marks = [_mark(each) for each in given]
        return None if None in marks else tuple(marks)
    if type(given) is not Tensor or given.is_inference():  # these do not count what is written
        return None
    return given.data_ptr(), given.shape, given.stride(), given.dtype, given._version


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
