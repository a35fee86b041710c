"""Statistics of a store against numpy on all rows at once."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.store import rows as blocks
from dreamreader.store import stats as module
from dreamreader.store.layout import Moment, SiteLayout
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.stats import QUANTILES, stats
from dreamreader.store.store import Store

HEADS, OUT = "block.attn:heads", "block.out"


def store_of(folder, values: torch.Tensor, stored=torch.float32) -> Store:
    """One site `a`, one unit, one step."""
    writer = ReferenceWriter(folder, "0" * 64)
    writer.begin(0)
    site = writer.site(SiteLayout("a", values.shape[1], stored, torch.float32))
    number = torch.arange(len(values))
    zero = torch.zeros_like(number)
    writer.put(
        site,
        values[:, None],
        torch.stack([number, zero], 1).int(),
        torch.stack([zero, zero, zero, number], 1).int(),
    )
    writer.seal(pa.table({"id": ["0"]}), [Moment(0, 0, 1.0, 1.0, 0.0)], ["all"])
    return Store(folder)


@pytest.mark.parametrize("block", [100, 1 << 20])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_against_numpy(stored, block, written, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    store, events = Store(written(stored=stored)), []
    found = stats(store, HEADS, covariance=True, progress=events.append)
    rows = store.read(HEADS)
    values = rows.values.double().numpy()
    keys = [(key["step"], key["branch"]) for key in rows.keys.to_pylist()]
    assert (
        events[-1].done == events[-1].total == len(values) == found.whole.rows
        and found.not_finite == 0
    )
    assert [(each.step, each.branch) for each in found.groups] == sorted(set(keys))
    for group in (found.whole, *found.groups):
        own = values[[group.step is None or key == (group.step, group.branch) for key in keys]]
        norms = np.linalg.norm(own, axis=1)
        assert group.rows == len(own)
        assert np.allclose(group.mean, own.mean(0), rtol=1e-12, atol=1e-14)
        assert np.allclose(group.variance, own.var(0), rtol=1e-12)
        assert math.isclose(group.mean_norm, norms.mean(), rel_tol=1e-12)
        wanted = np.quantile(norms, QUANTILES, method="lower")
        assert np.allclose(list(group.norm_quantiles.values()), wanted, rtol=1e-3)
    assert np.allclose(found.covariance, np.cov(values.T, bias=True), rtol=1e-10, atol=1e-12)


def test_a_mean_that_is_large_beside_the_spread(tmp_path) -> None:
    values = torch.randn(500, 3) * 1e-2 + 1000
    found = stats(store_of(tmp_path, values), "a", covariance=True)
    wide = values.double().numpy()
    assert np.allclose(found.whole.variance, wide.var(0), rtol=1e-9)
    assert np.allclose(found.covariance, np.cov(wide.T, bias=True), rtol=1e-7, atol=1e-12)


def test_selections(written) -> None:
    store = Store(written())
    found = stats(store.path, OUT, steps=[0, 2], branch="cond")
    assert [(each.step, each.branch) for each in found.groups] == [(0, "cond"), (2, "cond")]
    values = store.read(OUT, [0, 2], "cond").values.double()
    assert torch.allclose(found.whole.mean, values.mean(0), atol=1e-14)
    assert found.covariance is None


def test_rows_that_are_not_finite_are_counted_and_left_out(tmp_path) -> None:
    values = torch.randn(40, 5)
    values[3, 1], values[7, 0], values[8] = math.nan, math.inf, -math.inf
    found = stats(store_of(tmp_path, values), "a", covariance=True)
    kept = values[values.isfinite().all(1)].double().numpy()
    assert found.not_finite == 3 and found.whole.rows == 37
    assert np.allclose(found.whole.mean, kept.mean(0), atol=1e-14)
    assert np.allclose(found.covariance, np.cov(kept.T, bias=True), atol=1e-12)


def test_normalisation(tmp_path) -> None:
    values = torch.randn(3000, 16) * 3 + torch.linspace(-4, 9, 16)
    found = stats(store_of(tmp_path, values), "a")
    mean, scale = found.normalisation()
    assert mean.dtype == torch.float32 and not mean.any()
    assert math.isclose((values * scale).norm(dim=1).mean(), 4, rel_tol=1e-5)
    mean, scale = found.normalisation(centre=True)
    rows = (values - mean) * scale
    assert rows.mean(0).abs().max() < 1e-5
    assert math.isclose(rows.square().sum(1).mean().sqrt(), 4, rel_tol=1e-5)


def test_rows_of_norm_zero(tmp_path) -> None:
    found = stats(store_of(tmp_path, torch.zeros(9, 2)), "a")
    assert found.whole.mean_norm == 0 and max(found.whole.norm_quantiles.values()) < 1e-300
    for centre in (True, False):
        with pytest.raises(InvalidInput, match="a: rows of norm 0 cannot be scaled to a norm"):
            found.normalisation(centre)


def test_table_and_json(written, tmp_path) -> None:
    found = stats(written(), OUT, covariance=True)
    lines = found.table().to_pylist()
    assert [(line["step"], line["branch"]) for line in lines] == [
        (step, branch) for step in range(3) for branch in ("cond", "uncond")
    ]
    first = found.groups[0]
    assert lines[0]["rows"] == 16 and lines[0]["mean_norm"] == first.mean_norm
    assert lines[0]["variance"] == float(first.variance.sum())
    assert lines[0]["norm_q0.5"] == first.norm_quantiles[0.5]
    content = json.loads(found.write(tmp_path / "stats.json").read_text())
    assert content["site"]["name"] == OUT and content["whole"]["step"] is None
    assert content["whole"]["mean"] == found.whole.mean.tolist()
    assert content["groups"][5]["variances"] == found.groups[5].variance.tolist()
    assert content["not_finite"] == 0
    assert np.array_equal(np.load(tmp_path / "stats.covariance.npy"), found.covariance)


def test_bad_input(written, tmp_path, monkeypatch) -> None:
    folder = written(units=1)
    with pytest.raises(UnknownName, match="unknown site 'block'; nearest: block.out"):
        stats(folder, "block")
    with pytest.raises(InvalidInput, match="block.out: no rows with finite values are chosen"):
        stats(folder, OUT, steps=5)
    with pytest.raises(InvalidInput, match="a: no rows with finite values are chosen"):
        stats(store_of(tmp_path / "nan", torch.full((3, 2), math.nan)), "a")
    monkeypatch.setattr(module, "WIDEST", 6)
    with pytest.raises(InvalidInput, match="a covariance takes 6 features at most, it has 7"):
        stats(folder, OUT, covariance=True)
