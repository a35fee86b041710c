"""Moments of all pairs of sites are those of each pair alone, whatever the batches and grids."""

from typing import Any

import numpy as np
import pytest
import torch

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.mapping import CrossMoments, MomentMatrix, PairedRows, correlate_success, fit_map
from dreamreader.recording import Pairs, resample_grid


@pytest.fixture(params=[2**24, 1], ids=["at once", "row by row"], autouse=True)
def blocks(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large recordings are added in blocks of rows."""
    monkeypatch.setattr("dreamreader.mapping.matrix._FLOATS", request.param)
    monkeypatch.setattr("dreamreader.mapping.matrix._BLOCK", min(4096, request.param))


def recording(rows: int = 5, seed: int = 0) -> Pairs:
    """Two sites of each side on grids of 4 x 4 and 2 x 2, of 3 calls."""
    torch.manual_seed(seed)
    source = {"fine": torch.randn(rows, 3, 16, 6) + 2, "coarse": torch.randn(rows, 3, 4, 5)}
    target = {"fine": torch.randn(rows, 3, 16, 4), "coarse": torch.randn(rows, 3, 4, 7) - 1}
    grids: dict[str, tuple[int, int] | None] = {"fine": (4, 4), "coarse": (2, 2)}
    return Pairs(source, target, None, grids=(grids, grids))


def same(one: CrossMoments, other: CrossMoments) -> None:
    assert one.rows == other.rows and one.weight == other.weight
    for name in ("source_mean", "target_mean", "source_scatter", "cross_scatter", "target_scatter"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-9)


def test_every_pair_of_sites_has_the_moments_of_its_own_rows() -> None:
    matrix, parts = MomentMatrix(), [recording(), recording(3, 1)]
    for part in parts:
        matrix.add(part)
    grids = {"fine": (4, 4), "coarse": (2, 2)}
    assert sorted(matrix) == [(a, b) for a in ("coarse", "fine") for b in ("coarse", "fine")]
    for source, target in matrix:
        alone = CrossMoments(parts[0].source[source].shape[3], parts[0].target[target].shape[3],
                             gram=True)  # fmt: skip
        for part in parts:
            x = resample_grid(part.source[source], grids[source], grids[target])
            alone.add(x, part.target[target])
        same(matrix.moments(source, target), alone)
        one = fit_map(matrix.moments(source, target), "ridge", lambdas=0.1)
        other = fit_map(alone, "ridge", lambdas=0.1)
        torch.testing.assert_close(one.weight, other.weight)  # pyright: ignore


def test_padding_has_no_part_in_the_sums_and_no_row_that_is_kept() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 1, 5, 3), torch.randn(4, 1, 5, 2)
    counts = torch.tensor([5, 2, 1, 3])
    gone = torch.arange(5) >= counts[:, None]
    x[:, 0][gone] = torch.nan
    matrix = MomentMatrix(sample=100)
    matrix.add(Pairs({"a": x}, {"b": y}, None, {"a": counts, "b": counts}))
    alone = CrossMoments(3, 2, gram=True)
    alone.add(x[:, 0][~gone], y[:, 0][~gone])
    same(matrix.moments("a", "b"), alone)
    rows = matrix.rows("a", "b")
    assert len(rows) == 11 and bool(rows.x.isfinite().all())


def test_the_rows_that_are_kept_are_pairs_and_as_many_of_each_batch() -> None:
    matrix = MomentMatrix(sample=7, seed=3)
    parts = [recording(), recording(3, 1)]
    for part in parts:
        matrix.add(part)
    for source, target in matrix:
        rows = matrix.rows(source, target)
        assert len(rows) == 14 and len(rows.x.unique(dim=0)) == 14
        flat = [PairedRows.of(part, source, target) for part in parts]
        known = torch.cat([torch.cat([r.x, r.y], 2).flatten(0, 1) for r in flat])
        own = torch.cat([rows.x, rows.y], 2).flatten(0, 1)
        assert (own[:, None] - known).abs().amax(2).amin(1).max() < 1e-6


def test_a_state_goes_on_to_the_same_bits() -> None:
    whole, half = MomentMatrix(sample=4), MomentMatrix(sample=4)
    for part in (recording(), recording(3, 1)):
        whole.add(part)
        whole.state_dict()
    half.add(recording())
    half = MomentMatrix.of_state(*half.state_dict())
    half.add(recording(3, 1))
    (one, values), (other, again) = whole.state_dict(), half.state_dict()
    assert values == again and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(InvalidInput, match=r"sums of \{'counts': \[2\], 'shift': \[3\].*got"):
        CrossMoments(2, 1).load_state_dict(CrossMoments(2, 2).state_dict())


def test_sites_that_do_not_pair_are_told_and_others_do() -> None:
    pairs = recording()
    pairs.source["text"] = torch.randn(5, 3, 77, 2)
    matrix = MomentMatrix()
    matrix.add(pairs)
    assert sorted(matrix.refused) == [("text", "coarse"), ("text", "fine")]
    assert "text has 77 tokens and fine a grid of 4 x 4" in matrix.refused["text", "fine"]
    assert ("text", "fine") not in list(matrix) and len(list(matrix)) == 4
    with pytest.raises(UnknownName, match="unknown pair of sites 'text -> fine'"):
        matrix.moments("text", "fine")
    with pytest.raises(InvalidInput, match="no two sites pair: text has 77 tokens"):
        MomentMatrix().add(Pairs({"text": pairs.source["text"]}, pairs.target, None,
                                 grids=pairs.grids))  # fmt: skip


def test_scores_that_order_the_pairs_as_success_does_correlate() -> None:
    success = np.linspace(0, 1, 12)
    noise = np.random.default_rng(0).permutation(12) / 12
    found = correlate_success({"same": success**3, "not": noise, "other": -success}, success)
    assert found["same"].value == 1 and found["other"].value == pytest.approx(-1)
    assert found["not"].low < found["not"].value < found["not"].high
    with pytest.raises(InvalidInput, match="2 pairs of sites have a success; an order needs 3"):
        correlate_success({"same": success[:2]}, success[:2])
