"""The permutation without memory: one to one, uniform, the same in C++ and numpy."""

import numpy as np
import pytest
import torch

from dreamreader import _register
from dreamreader.errors import InvalidInput
from dreamreader.ops import permuted, permuted_reference
from tests.cases.permutation import LARGE, SIZES


@pytest.mark.parametrize("n", SIZES)
def test_it_is_one_to_one(n: int):
    for seed in (0, 1, -5, 2**64 - 1):
        assert np.array_equal(np.sort(permuted(np.arange(n), n, seed)), np.arange(n))


@pytest.mark.skipif(_register.native()[0] is None, reason="the native module is not built")
@pytest.mark.parametrize("n", [*SIZES, *LARGE])
def test_arrays_and_tensors_agree(n: int):
    rng = np.random.default_rng(n)
    indices = rng.integers(0, n, 500)
    for seed in (0, 7, 2**63 + 11, -3):
        want = permuted_reference(indices, n, seed)
        assert np.array_equal(permuted(indices, n, seed), want)
        assert np.array_equal(permuted(torch.from_numpy(indices), n, seed).numpy(), want)


def test_values_never_change():
    """Stored jobs and shuffled epochs depend on these numbers."""
    assert permuted(np.arange(8), 8, 0).tolist() == [1, 0, 4, 3, 5, 6, 2, 7]
    assert permuted(np.array([0, 1, 10**12]), 2**50 + 3, 42).tolist() == [
        711857864500411,
        326877726625342,
        205147279603761,
    ]


def test_large_ranges_have_no_collisions_and_stay_inside():
    for n in (2**62, 2**62 - 1, 2**61 + 1):
        found = permuted(np.arange(n - 1000, n), n, 9)
        assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < n


def test_several_seeds_at_a_time():
    seeds = np.array([3, -1, 2**62])
    together = permuted_reference(np.array(4), 100, seeds)
    assert together.tolist() == [int(permuted(np.array([4]), 100, int(s))[0]) for s in seeds]


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    """Deviations above what chance gives, in standard deviations."""
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("n", [2, 3, 5, 12, 64, 100])
def test_every_position_is_reached_equally_often(n: int):
    """Over seeds in a row, as samples of one job have them."""
    seeds = np.arange(20_000)
    table = np.zeros((n, n))
    for index in range(n if n < 20 else 20):
        found = permuted_reference(np.array(index), n, seeds)
        table[index] = np.bincount(found, minlength=n)
        assert abs(chi_square(table[index], len(seeds) / n)) < 5, index


@pytest.mark.parametrize("n", [3, 4])
def test_every_order_appears_equally_often(n: int):
    seeds = np.arange(24_000)
    orders = np.stack([permuted_reference(np.array(i), n, seeds) for i in range(n)], 1)
    _, counts = np.unique(orders @ (n ** np.arange(n)), return_counts=True)
    assert len(counts) == np.prod(np.arange(1, n + 1))
    assert abs(chi_square(counts, len(seeds) / len(counts))) < 5


@pytest.mark.parametrize("n", [1000, 65_536, 100_003])
def test_neighbours_are_not_correlated(n: int):
    count = min(n, 50_000)
    for seed in range(4):
        found = permuted(np.arange(count), n, seed).astype(float)
        for distance in (1, 2, 16):
            r = np.corrcoef(found[:-distance], found[distance:])[0, 1]
            assert abs(r) < 5 / np.sqrt(count), (seed, distance)
        step = (found[1:] - found[:-1]) % n
        bins = np.histogram(step, bins=50, range=(0, n))[0]
        assert abs(chi_square(bins, len(step) / 50)) < 5, seed


def test_subsets_hold_every_pair_equally_often():
    n, kept, seeds = 12, 4, np.arange(20_000)
    rows = np.stack([permuted_reference(np.array(j), n, seeds) for j in range(kept)], 1)
    inside = np.zeros((len(seeds), n))
    np.put_along_axis(inside, rows, 1.0, axis=1)
    pairs = (inside.T @ inside)[np.triu_indices(n, 1)]
    expected = len(seeds) * kept * (kept - 1) / (n * (n - 1))
    assert np.abs(pairs - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: permuted(np.arange(3), 0, 1), r"n must be 1 .. 2\^62, got 0"),
        (lambda: permuted(np.arange(3), 2**62 + 1, 1), r"n must be 1 .. 2\^62, got 46116860"),
        (lambda: permuted(np.arange(3), 2, 1), r"indices must be 0 .. 1, got 0 .. 2"),
        (lambda: permuted(np.array([-1]), 2, 1), r"indices must be 0 .. 1, got -1 .. -1"),
        (lambda: permuted(np.arange(3.0), 3, 1), "indices must be int64, got float64"),
        (lambda: permuted(torch.ones(1), 3, 1), "must be int64 on the CPU, got float32 on cpu"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(call, text):
    with pytest.raises(InvalidInput, match=text):
        call()
