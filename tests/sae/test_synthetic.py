"""Samples against a plain sampler that draws every feature of every row, and what trees demand."""

from dataclasses import replace

import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.sae import synthetic
from dreamreader.sae.synthetic import (
    RARE,
    SyntheticConfig,
    SyntheticFeatures,
    compensate,
    orthogonalise,
    zipf,
)

# 4 trees of 13 features, lone frequent and lone rare ones; shared factors matter
SMALL = SyntheticConfig(
    features=200,
    d_in=24,
    min_probability=2e-3,
    roots=4,
    branching=3,
    depth=2,
    rank=3,
    correlation=0.35,
    deviation=(1.0, 1.0),
    orthogonal_steps=0,
)
ROWS = 30_000


def sample_plainly(world: SyntheticFeatures, n: int, seed: int) -> torch.Tensor:
    """Strengths [n, features] as the definition reads: one number drawn for each."""
    generator = torch.Generator().manual_seed(seed)
    c = world.config
    normal = torch.distributions.Normal(0.0, 1.0)
    chance = compensate(world.probabilities, world.parents).double()
    threshold = normal.icdf(1 - chance).float()
    shared = torch.randn(n, c.rank, generator=generator)
    own = torch.randn(n, c.features, generator=generator)
    z = shared @ world.factor.T + own * (1 - world.factor.square().sum(1)).sqrt()
    noise = torch.randn(n, c.features, generator=generator)
    strength = (world.means + world.deviations * noise).relu() * (z > threshold)
    for feature in range(c.features):
        parent = int(world.parents[feature])
        siblings = (world.parents == parent).nonzero().squeeze(1).tolist()
        if parent >= 0 and feature == siblings[0]:
            strength[:, siblings] *= (strength[:, parent] / world.means[parent])[:, None]
            score = torch.rand(n, len(siblings), generator=generator)
            score[strength[:, siblings] == 0] = -1
            loser = torch.arange(len(siblings)) != score.argmax(1, keepdim=True)
            strength[:, siblings] = strength[:, siblings].masked_fill(loser, 0)
    return strength


@pytest.fixture(scope="module")
def world() -> SyntheticFeatures:
    return SyntheticFeatures(SMALL)


@pytest.fixture(scope="module")
def drawn(world) -> torch.Tensor:
    return world.sample_codes(ROWS, torch.Generator().manual_seed(1)).dense()


@pytest.fixture(scope="module")
def plain(world) -> torch.Tensor:
    return sample_plainly(world, ROWS, 2)


def spread(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Differences of the column means, in standard errors."""
    error = ((a.var(0) + b.var(0)) / ROWS).sqrt()
    return ((a.mean(0) - b.mean(0)) / error)[error > 0]


def test_the_small_world_has_every_kind_of_feature(world):
    tree = world.parents >= 0
    assert int(tree.sum()) == 4 * (3 + 9)
    lone = world.probabilities[52:]
    assert 0 < int((lone >= RARE).sum()) < len(lone)
    assert float(world.factor.square().sum(1).max()) > 0.9  # some rows are cut


@pytest.mark.parametrize("power", [0, 1, 2])
def test_each_feature_fires_as_often_and_as_strongly(drawn, plain, power):
    moments = [(x > 0).float() if power == 0 else x.double() ** power for x in (drawn, plain)]
    z = spread(*moments)
    assert len(z) == SMALL.features
    assert float(z.abs().max()) < 4.5
    assert 0.75 < float(z.square().mean()) < 1.3  # 200 features: standard deviation 0.1


def test_candidates_are_exact_for_frequent_features_too(monkeypatch):
    monkeypatch.setattr(synthetic, "RARE", 2.0)
    world = SyntheticFeatures(replace(SMALL, roots=0, max_probability=0.9, deviation=(2.0, 1.0)))
    codes = world.sample_codes(ROWS, torch.Generator().manual_seed(4))
    rate = codes.column_counts() / ROWS
    want = world.probabilities * torch.special.ndtr(world.means / world.deviations)
    z = (rate - want) / (want * (1 - want) / ROWS).sqrt()
    assert float(z.abs().max()) < 4.5 and 0.75 < float(z.square().mean()) < 1.3


def test_pairs_fire_together_as_often(drawn, plain):
    common = plain.gt(0).float().mean(0).topk(40).indices
    together = []
    for x in (drawn, plain):
        fires = (x[:, common] > 0).double()
        together.append((fires.T @ fires / ROWS)[*torch.triu_indices(40, 40, 1)])
    a, b = together
    error = ((a * (1 - a) + b * (1 - b)) / ROWS).sqrt()
    z = ((a - b) / error)[error > 0]
    assert float(z.abs().max()) < 5
    assert 0.8 < float(z.square().mean()) < 1.25
    for lone in (torch.arange(52, 72), torch.arange(180, 200)):
        fires = (drawn[:, lone] > 0).double()
        apart = fires.mean(0)[:, None] * fires.mean(0)
        z = (fires.T @ fires / ROWS - apart) / (apart / ROWS).sqrt()
        assert float(z[*torch.triu_indices(20, 20, 1)].max()) > 8  # they are not independent


def test_number_of_features_in_a_row(drawn, plain):
    a, b = ((x > 0).sum(1).double() for x in (drawn, plain))
    assert abs(float(spread(a[:, None], b[:, None]))) < 4
    assert float(a.var() / b.var()) == pytest.approx(1, abs=0.03)


def test_children_need_their_parent_and_exclude_each_other(world, drawn):
    for parent in world.parents[world.parents >= 0].unique().tolist():
        children = drawn[:, world.parents == parent] > 0
        assert int(children.sum()) > 0
        assert not bool((children.any(1) & (drawn[:, parent] == 0)).any())
        assert int(children.sum(1).max()) == 1


def test_children_are_as_strong_as_their_parent():
    config = replace(SMALL, deviation=(0.0, 0.0), magnitude=(5.0, 4.0))
    world = SyntheticFeatures(config)
    world.means[:4] = 8.0
    world.deviations[:4] = 2.0
    codes = world.sample_codes(2000, torch.Generator().manual_seed(0)).dense()
    for child in (world.parents >= 0).nonzero().squeeze(1).tolist():
        fires = codes[:, child] > 0
        parent = int(world.parents[child])
        want = world.means[child] * codes[fires, parent] / world.means[parent]
        torch.testing.assert_close(codes[fires, child], want)


def test_activations_are_sums_of_directions(world):
    x, codes = world.sample(50, torch.Generator().manual_seed(3))
    assert codes.width == 200 and codes.rows == 50 and codes.slots == int(codes.count())
    for begin, end in zip(codes.row_ptr[:-1], codes.row_ptr[1:], strict=True):
        columns = codes.columns[begin:end]
        assert columns.tolist() == sorted(set(columns.tolist()))
    assert float(codes.values.min()) > 0
    torch.testing.assert_close(x, codes.dense() @ world.directions + world.bias)


def test_a_batch_is_a_function_of_its_place(world):
    x, codes = world.batch(5, 64, seed=9)
    again, more = world.batch(5, 64, seed=9)
    assert torch.equal(x, again) and torch.equal(codes.columns, more.columns)
    for other in (world.batch(6, 64, seed=9), world.batch(5, 64, seed=10)):
        assert not torch.equal(x, other[0])
    stream = world.batches(64, seed=9)
    assert torch.equal(stream.draw(5), x)
    assert stream.of == world.batches(64, seed=9).of != world.batches(64, seed=8).of
    rebuilt, _ = SyntheticFeatures(SMALL).batch(5, 64, seed=9)
    assert torch.equal(x, rebuilt)


@pytest.mark.parametrize(
    "change",
    [
        {"features": 1, "roots": 0},
        {"features": 3, "roots": 8},
        {"features": 9, "roots": 4},  # the second root has two children, the others none
        {"features": 52},  # nothing is alone
        {"roots": 0},
        {"depth": 0},
        {"branching": 1},
        {"max_probability": 1.0, "min_probability": 1.0},
        {"min_probability": 0.02},  # nothing is rare
    ],
)
def test_worlds_of_other_shapes(change):
    world = SyntheticFeatures(replace(SMALL, **change))
    x, codes = world.sample(3000, torch.Generator().manual_seed(0))
    assert x.shape == (3000, 24) and bool(x.isfinite().all())
    rate = codes.column_counts() / 3000
    lone = world.parents < 0
    want = (world.probabilities * torch.special.ndtr(world.means / world.deviations))[lone]
    error = (want * (1 - want) / 3000).sqrt().clamp(min=1e-6)
    assert float(((rate[lone] - want) / error).abs().max()) < 4.5
    empty, none = world.sample(0)
    assert empty.shape == (0, 24) and int(none.count()) == 0


def test_a_saved_world_draws_the_same(tmp_path):
    world = SyntheticFeatures(replace(SMALL, orthogonal_steps=3))
    world.save(tmp_path / "world.safetensors")
    found = SyntheticFeatures.load(tmp_path / "world.safetensors")
    assert found.config == world.config
    x, codes = world.batch(2, 40)
    again, more = found.batch(2, 40)
    assert torch.equal(x, again) and torch.equal(codes.values, more.values)
    with pytest.raises(InvalidInput, match=r"directions must be \[200, 24\], got \[199, 24\]"):
        SyntheticFeatures(SMALL, directions=world.directions[1:])


def test_zipf_goes_from_the_largest_to_the_smallest():
    p = zipf(4, 0.5, 0.4, 0.1)
    raw = torch.tensor([1.0, 2**-0.5, 3**-0.5, 0.5])
    torch.testing.assert_close(p, 0.1 + 0.3 * (raw - 0.5) / 0.5)
    assert zipf(1, 0.5, 0.4, 0.1).tolist() == [pytest.approx(0.4)]


def test_compensation_of_a_family():
    p, parents = torch.tensor([0.4, 0.1, 0.06, 0.9]), torch.tensor([-1, 0, 0, 1])
    want = [0.4, 0.1 / 0.4 * (1 + 0.06 / 0.4), 0.06 / 0.4 * (1 + 0.1 / 0.4), 1.0]
    torch.testing.assert_close(compensate(p, parents), torch.tensor(want))


def test_directions_are_pushed_apart_as_the_table_of_products_says():
    start = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).double()
    start = start / start.norm(dim=1, keepdim=True)
    table = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.01)
    for _ in range(6):
        optimizer.zero_grad()
        product = table @ table.T
        diagonal = product.diagonal()
        loss = product.square().sum() - diagonal.square().sum() + 30 * (diagonal - 1).square().sum()
        loss.backward()
        optimizer.step()
    want = (table / table.norm(dim=1, keepdim=True)).detach()
    got = orthogonalise(start, 6, 0.01)
    torch.testing.assert_close(got, want)
    assert float((got @ got.T).square().sum()) < float((start @ start.T).square().sum())
    torch.testing.assert_close(orthogonalise(start, 0, 0.01), start)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"features": 0}, "features is a whole number of at least 1, got 0"),
        ({"d_in": 2.5}, "d_in is a whole number"),
        ({"branching": True}, "branching is a whole number"),
        ({"min_probability": 0.5}, "0 < min_probability <= max_probability, got 0.5 and 0.4"),
        ({"min_probability": float("nan")}, "min_probability"),
        ({"max_probability": 1.5}, "max_probability <= 1, got 1.5"),
        ({"exponent": 0.0}, "exponent > 0, got 0.0"),
        ({"correlation": -0.1}, "correlation >= 0"),
        ({"magnitude": (5.0, 0.0)}, "magnitudes above 0"),
        ({"deviation": (0.5, -1.0)}, "standard deviation"),
    ],
)
def test_numbers_that_cannot_be_right(change, says):
    with pytest.raises(InvalidInput, match=says):
        replace(SMALL, **change)


def test_a_negative_number_of_rows(world):
    with pytest.raises(InvalidInput, match="at least 0, got -1"):
        world.sample(-1)
