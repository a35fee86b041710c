"""Choice of tokens: which places of a batch are kept in one call, and the keys of their rows."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dreamreader import _alloc
from dreamreader._register import chosen_backend, native
from dreamreader.errors import InvalidInput
from dreamreader.ops.permutation import mix64, permuted_reference

_STREAM = 2**63 - 1  # streams fit both int64 and uint64
_BITS = 2**64 - 1


class Chosen(NamedTuple):
    """What `choose` gives: a row for each kept token.

    Attributes:
        places: int32 [rows, 2], entry of the batch and token, as `pack` takes them.
        keys: int32 [rows, 4], sample, moment, branch and token.
    """

    places: Int[Tensor, "rows 2"]
    keys: Int[Tensor, "rows 4"]


def choose(
    tokens: Int[Tensor, " candidates"],
    offsets: Int[Tensor, " n_plus_1"],
    entries: Int[Tensor, " n"],
    samples: Int[Tensor, " n"],
    branches: Int[Tensor, " n"],
    streams: Int[Tensor, " n"],
    moment: int,
    counts: Int[Tensor, " n"] | None = None,
    *,
    shift: Int[Tensor, " n"] | None = None,
    out: Chosen | None = None,
    checked: bool = True,
) -> Chosen:
    """Keeps candidates of every entry: all, or so many that its own stream draws.

    Formula: entry e keeps tokens[offsets[e] + permuted(j, n_e, streams[e])] for j < counts[e] of
        its n_e candidates, without replacement, in ascending order.

    Args:
        tokens: int32, the candidates of all entries one after the other, those of each ascending.
        offsets: int32, where each entry's candidates begin in tokens, and where the last's end.
        entries: int32, the place of each entry in the batch.
        samples, branches: int32, columns of the keys.
        streams: int64, a seed for each entry (`streams_of`): what is kept does not depend on the
            other entries.
        moment: column of the keys.
        counts: int32, how many each entry keeps; never more than it has. All by default.
        shift: int32, added to the token in the keys only (tokens behind padding).
        out: int32 places [room, 2] and keys [room, 4], dense, that the rows are written into; then
            nothing is allocated.
        checked: False for tensors that are known to be right; a short choice takes less than its
            checks.

    Returns:
        The rows, entry by entry; with `out` its first rows.

    Raises:
        InvalidInput: a tensor has another shape or dtype than the above or is not dense on the CPU,
            candidates or offsets do not ascend, a count is negative, or `out` has too little room.

    Example:
        >>> import torch
        >>> one = torch.zeros(1, dtype=torch.int32)
        >>> tokens, offsets = torch.arange(4).int(), torch.tensor([0, 4]).int()
        >>> choose(tokens, offsets, one, one + 7, one, one.long(), 3, one + 2).keys.tolist()
        [[7, 3, 0, 2], [7, 3, 0, 3]]
    """
    if checked:
        _check(tokens, offsets, entries, samples, branches, streams, counts, shift, out)
    if out is None:
        out = _room(_rows(offsets, counts), tokens.device)
    call = _reference if _native is None else _native.choose_cpu
    rows = call(tokens, offsets, entries, samples, branches, streams, counts, shift, moment, *out)
    if rows < 0:
        room, needed = len(out.places), _rows(offsets, counts)
        raise _misfit(f"out has room for {room} rows, {needed} are kept")
    return out if rows == len(out.places) else Chosen(out.places[:rows], out.keys[:rows])


def choose_reference(
    tokens: Tensor,
    offsets: Tensor,
    entries: Tensor,
    samples: Tensor,
    branches: Tensor,
    streams: Tensor,
    moment: int,
    counts: Tensor | None = None,
    shift: Tensor | None = None,
) -> Chosen:
    """The definition of `choose` in numpy, with its arguments."""
    places, keys = [np.empty((0, 2), np.int32)], [np.empty((0, 4), np.int32)]
    for e, entry in enumerate(entries.tolist()):
        mine = tokens.numpy()[offsets[e] : offsets[e + 1]]
        if counts is not None:
            first = np.arange(min(int(counts[e]), len(mine)))
            drawn = permuted_reference(first, max(len(mine), 1), int(streams[e]))
            mine = mine[np.sort(drawn)]
        token = mine + (0 if shift is None else int(shift[e]))
        places.append(np.stack([np.full_like(mine, entry), mine], 1))
        columns = (int(samples[e]), moment, int(branches[e]))
        keys.append(np.stack([*(np.full_like(mine, each) for each in columns), token], 1))
    both = (np.concatenate(each).astype(np.int32) for each in (places, keys))
    return Chosen(*(torch.from_numpy(each) for each in both))


def streams_of(
    seed: int, samples: np.ndarray, step: int = -1, evaluation: int = -1, branch: str = ""
) -> np.ndarray:
    """Seeds that belong to samples alone: the same on every machine, in every batch and order.

    Args:
        seed: of the job.
        samples: integers, the numbers of the samples.
        step, evaluation: of the call; -1 for what belongs to the whole sample (`counts_of_budget`).
        branch: guidance branch of the entry.

    Returns:
        int64 of the shape of samples, 0 or more.
    """
    name = int.from_bytes(hashlib.blake2b(branch.encode(), digest_size=8).digest(), "little")
    state = np.zeros(1, np.uint64)
    for word in (seed, step, evaluation, name):
        state = mix64(state ^ _word(np.array([word & _BITS], np.uint64)))
    mixed = mix64(state ^ _word(samples.astype(np.uint64).reshape(-1)))
    return (mixed & np.uint64(_STREAM)).astype(np.int64).reshape(samples.shape)


def stream_of(
    seed: int, sample: int, step: int = -1, evaluation: int = -1, branch: str = ""
) -> int:
    """`streams_of` for one sample, 0 .. 2^63 - 1."""
    return int(streams_of(seed, np.array([sample]), step, evaluation, branch)[0])


def counts_of_budget(
    budget: int, calls: int, call: int, streams: Int[Tensor, " images"]
) -> Int[Tensor, " images"]:
    """Splits a number of rows per image over the calls of its site, exactly.

    Formula: budget // calls, and one more in those calls that permuted(call, calls, stream) puts
        below budget % calls. Over all calls the sum is the budget; `choose` keeps fewer where a
        call has fewer candidates.

    Args:
        budget: rows of one image.
        calls: how many calls there are for each image.
        call: number of this call, 0 .. calls - 1.
        streams: int64, a seed for each image, the same in all its calls.

    Returns:
        int32, new memory.

    Raises:
        InvalidInput: a number is out of range, or streams are not dense int64 on the CPU.

    Example:
        >>> import torch
        >>> [int(counts_of_budget(5, 3, call, torch.tensor([8]))) for call in range(3)]
        [1, 2, 2]
    """
    if not 0 <= call < calls or not 0 <= budget // max(calls, 1) < 2**31 - 1:
        raise InvalidInput(
            f"counts_of_budget: expected 0 <= call < calls and a budget of 0 or more, got "
            f"budget {budget}, calls {calls}, call {call}"
        )
    _expect("counts_of_budget", "streams", streams, torch.int64, [len(streams)])
    counts = _alloc.empty((len(streams),), dtype=torch.int32, device=streams.device)
    if _native is None:
        extra = permuted_reference(np.array(call), calls, streams.numpy()) < budget % calls
        return counts.copy_(torch.from_numpy(budget // calls + extra))
    _native.counts_of_budget_cpu(budget, calls, call, streams, counts)
    return counts


def _reference(tokens, offsets, entries, samples, branches, streams, counts, shift, moment, *out):
    """`choose_reference` into given memory, as the native module does it."""
    found = choose_reference(
        tokens, offsets, entries, samples, branches, streams, moment, counts, shift
    )
    rows = len(found.places)
    if rows > len(out[0]):
        return -1
    for to, rest in zip(out, found, strict=True):
        to[:rows] = rest
    return rows


def _word(value: np.ndarray) -> np.ndarray:
    return mix64(value + np.uint64(0x9E3779B97F4A7C15))


def _rows(offsets: Tensor, counts: Tensor | None) -> int:
    each = np.diff(offsets.numpy())
    return int((each if counts is None else np.minimum(each, counts.numpy())).sum())


def _room(rows: int, device: torch.device) -> Chosen:
    return Chosen(
        _alloc.empty((rows, 2), dtype=torch.int32, device=device),
        _alloc.empty((rows, 4), dtype=torch.int32, device=device),
    )


def _check(tokens, offsets, entries, samples, branches, streams, counts, shift, out) -> None:
    """Raises InvalidInput unless the tensors belong together."""
    n = len(entries)
    _expect("choose", "tokens", tokens, torch.int32, [len(tokens)])
    _expect("choose", "offsets", offsets, torch.int32, [n + 1])
    _expect("choose", "streams", streams, torch.int64, [n])
    named = {"entries": entries, "samples": samples, "branches": branches}
    for name, each in (named | {"counts": counts, "shift": shift}).items():
        if each is not None:
            _expect("choose", name, each, torch.int32, [n])
    if out is not None:
        _expect("choose", "out.places", out.places, torch.int32, [len(out.places), 2])
        _expect("choose", "out.keys", out.keys, torch.int32, [len(out.places), 4])
    bounds, candidates = offsets.numpy(), tokens.numpy()
    if bounds[0] != 0 or bounds[-1] != len(tokens) or (np.diff(bounds) < 0).any():
        raise _misfit(f"offsets must ascend from 0 to {len(tokens)}, got {bounds.tolist()}")
    falls = (candidates[1:] <= candidates[:-1]).nonzero()[0] + 1
    within = falls[~np.isin(falls, bounds)]
    if len(within):
        entry = int(np.searchsorted(bounds, within[0], side="right")) - 1
        raise _misfit(f"the candidates of entry {entry} do not ascend at {candidates[within[0]]}")
    if counts is not None and len(counts) and counts.numpy().min() < 0:
        raise _misfit(f"counts must be 0 or more, got {counts.numpy().min()}")


def _expect(call: str, name: str, value: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    if (
        value.dtype != dtype
        or list(value.shape) != shape
        or value.device.type != "cpu"
        or not value.is_contiguous()
    ):
        wanted = f"dense {str(dtype).removeprefix('torch.')} {shape} on the CPU"
        seen = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        strides = f" with strides {list(value.stride())} on {value.device}"
        raise InvalidInput(f"{call}: {name} must be {wanted}, got {seen}{strides}")


def _misfit(text: str) -> InvalidInput:
    return InvalidInput(f"choose: {text}")


_native: Any = native()[0] if chosen_backend() in (None, "native") else None

__all__ = ["Chosen", "choose", "choose_reference", "counts_of_budget", "stream_of", "streams_of"]
