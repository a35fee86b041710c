"""A seeded pseudo-random permutation of 0 .. n - 1 that needs no memory."""

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dreamreader._register import chosen_backend, native
from dreamreader.errors import InvalidInput

MOST = 2**62  # n may not be larger
ROUNDS = 8
_BITS = 2**64 - 1

Indices = TypeVar("Indices", Tensor, np.ndarray)


def permuted(indices: Indices, n: int, seed: int) -> Indices:
    """Tells where indices go under a pseudo-random permutation of 0 .. n - 1.

    Formula: the first of F(i), F(F(i)), ... that is below n, F a Feistel network of 8 rounds on the
        next even power of two. Each index is answered by itself: no table, no memory per index.

    Args:
        indices: int64, 0 .. n - 1, any shape, on the CPU.
        n: 1 .. 2^62.
        seed: chooses the permutation; taken modulo 2^64.

    Returns:
        int64 of the shape and kind (tensor or array) of indices, new memory. The same on every
        machine, with and without the native module.

    Raises:
        InvalidInput: n is not 1 .. 2^62, or indices are not int64 on the CPU or not below n.

    Example:
        >>> import torch
        >>> sorted(permuted(torch.arange(5), 5, seed=3).tolist())
        [0, 1, 2, 3, 4]

    Reference:
        Luby and Rackoff, How to construct pseudorandom permutations (1988); cycle walking: Black
        and Rogaway, Ciphers with arbitrary finite domains (2002).
    """
    if not 1 <= n <= MOST:
        raise InvalidInput(f"permuted: n must be 1 .. 2^62, got {n}")
    if isinstance(indices, Tensor):
        if indices.dtype != torch.int64 or indices.device.type != "cpu":
            seen = f"{str(indices.dtype).removeprefix('torch.')} on {indices.device}"
            raise InvalidInput(f"permuted: indices must be int64 on the CPU, got {seen}")
        return torch.from_numpy(permuted(indices.numpy(), n, seed))
    if indices.dtype != np.int64:
        raise InvalidInput(f"permuted: indices must be int64, got {indices.dtype}")
    if indices.size and (indices.min() < 0 or indices.max() >= n):
        raise InvalidInput(
            f"permuted: indices must be 0 .. {n - 1}, got {indices.min()} .. {indices.max()}"
        )
    if _native is None:
        return permuted_reference(indices, n, seed)
    flat = np.ascontiguousarray(indices).reshape(-1)
    out = np.empty(flat.shape, np.int64)
    _native.permuted_cpu(torch.from_numpy(flat), torch.from_numpy(out), n, seed & _BITS)
    return out.reshape(indices.shape)


def permuted_reference(indices: np.ndarray, n: int, seeds: int | np.ndarray) -> np.ndarray:
    """The definition of `permuted` in numpy; with several seeds, an index and a seed at a time.

    Args:
        indices: int64, 0 .. n - 1, any shape.
        n: 1 .. 2^62.
        seeds: one, or int64 that broadcasts with indices.

    Returns:
        int64 of the common shape.
    """
    if isinstance(seeds, int):
        seeds = np.array(seeds & _BITS, np.uint64)
    shape = np.broadcast_shapes(indices.shape, seeds.shape)
    value = np.broadcast_to(indices, shape).astype(np.uint64).reshape(-1)
    seed = np.broadcast_to(seeds, shape).astype(np.uint64).reshape(-1)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    outside = np.arange(value.size)
    while outside.size:
        value[outside] = _network(value[outside], seed[outside], half)
        outside = outside[value[outside] >= np.uint64(n)]
    return value.astype(np.int64).reshape(shape)


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 on uint64: every bit of x reaches every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _network(value: np.ndarray, seed: np.ndarray, half: int) -> np.ndarray:
    width, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = value >> width, value & mask
    for number in range(1, ROUNDS + 1):
        key = mix64(seed + np.uint64(number * 0x9E3779B97F4A7C15 & _BITS))
        left, right = right, left ^ (mix64(right ^ key) & mask)
    return left << width | right


_native: Any = native()[0] if chosen_backend() in (None, "native") else None

__all__ = ["MOST", "mix64", "permuted", "permuted_reference"]
