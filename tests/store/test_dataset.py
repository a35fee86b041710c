"""Batches for training: every row once, in an order that is shuffled and can be gone on with."""

import pickle
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.store.batch import Batch
from dreamreader.store.dataset import StoreDataset
from dreamreader.store.layout import Moment, SiteLayout
from dreamreader.store.order import BatchOrder
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.store import Store

HEADS, OUT = "block.attn:heads", "block.out"


@pytest.fixture
def store(written) -> Path:
    """288 rows of HEADS: 2 units of 4 samples, 3 steps, 2 branches, 6 tokens."""
    return written()


def places(batches, branches) -> list[tuple]:
    """Unit, sample, step, branch and token of every row."""
    found = []
    for batch in batches:
        unit, sample, step, branch, token = (each.tolist() for each in batch[1:])
        names = [branches[each] for each in branch]
        found += zip(unit, sample, step, names, token, strict=True)
    return found


def expected(store: Path, site: str = HEADS, **chosen) -> list[tuple]:
    keys = Store(store).read(site, **chosen).keys
    samples = {f"{unit}-{n}": n for unit in range(2) for n in range(4)}
    columns = (keys[name].to_pylist() for name in ("unit", "id", "step", "branch", "token"))
    return [(u, samples[i], s, b, t) for u, i, s, b, t in zip(*columns, strict=True)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size, world", [(7, 1), (50, 3), (1000, 2), (2, 100)])
def test_every_row_comes_once(store: Path, batch_size: int, world: int, shuffle: bool) -> None:
    found, counts = [], []
    for rank in range(world):
        dataset = StoreDataset(
            store, HEADS, batch_size=batch_size, rank=rank, world=world, shuffle=shuffle, keys=True
        )
        batches = list(dataset)
        assert len(batches) == len(dataset)
        assert all(len(each.values) == batch_size for each in batches[:-1])
        found += places(batches, dataset.branches)
        counts.append(len(batches))
    assert sorted(found) == sorted(expected(store))
    few = 0 < 288 % (batch_size * world) < world  # not a row for each rank in the last round
    assert max(counts) - min(counts) == few


def test_values_are_those_of_the_place(store: Path) -> None:
    rows = Store(store).read(HEADS)
    by_place = dict(zip(expected(store), rows.values, strict=True))
    dataset = StoreDataset(store, HEADS, batch_size=64, keys=True, dtype=None)
    for batch in dataset:
        assert isinstance(batch, Batch) and batch.values.dtype == torch.bfloat16
        for value, place in zip(batch.values, places([batch], dataset.branches), strict=True):
            assert torch.equal(value, by_place[place])
    assert dataset.branches == ("cond", "uncond")


def test_without_a_shuffle_rows_come_in_order(store: Path) -> None:
    dataset = StoreDataset(store, OUT, batch_size=10, shuffle=False)
    assert torch.equal(torch.cat(list(dataset)), Store(store).read(OUT).values)


@pytest.mark.parametrize("tokens", [None, 4, slice(2, None, 3)])
@pytest.mark.parametrize("chosen", [{}, {"steps": [0, 2]}, {"steps": 1, "branch": "uncond"}])
def test_filters(store: Path, chosen: dict, tokens) -> None:
    dataset = StoreDataset(store, HEADS, batch_size=20, keys=True, tokens=tokens, **chosen)
    numbers = range(6) if tokens is None else [4] if tokens == 4 else [2, 5]
    want = [each for each in expected(store, **chosen) if each[-1] in numbers]
    assert sorted(places(dataset, dataset.branches)) == sorted(want)
    assert dataset.rows == len(want)


def test_epochs_and_seeds_have_orders_of_their_own(store: Path) -> None:
    def order(**options) -> torch.Tensor:
        return torch.cat(list(StoreDataset(store, HEADS, batch_size=100, **options)))

    dataset = StoreDataset(store, HEADS, batch_size=100)
    first = torch.cat(list(dataset))
    assert torch.equal(torch.cat(list(dataset)), first)
    dataset.set_epoch(1)
    second = torch.cat(list(dataset))
    assert not torch.equal(second, first) and not torch.equal(order(seed=1), first)
    assert torch.equal(order(epoch=1), second)
    assert torch.equal(order(prefetch=0), first) and torch.equal(order(seed=0, epoch=0), first)


def test_drop_last_gives_every_rank_full_batches(store: Path) -> None:
    for rank in range(2):
        dataset = StoreDataset(store, HEADS, batch_size=50, rank=rank, world=2, drop_last=True)
        assert [len(each) for each in dataset] == [50, 50]
        assert len(dataset) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_of_a_data_loader_share_the_batches(store: Path, workers: int) -> None:
    dataset = StoreDataset(store, HEADS, batch_size=25, keys=True)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    assert len(loader) == 12
    alone = list(dataset)
    for batch, own in zip(loader, alone, strict=True):
        assert isinstance(batch, Batch)
        assert all(torch.equal(one, other) for one, other in zip(batch, own, strict=True))


def test_workers_that_stay_see_the_epoch(store: Path) -> None:
    dataset = StoreDataset(store, HEADS, batch_size=100)
    dataset.load_state_dict(dataset.state_dict(batches=1))
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    # No len(loader): torch warns where a later epoch is longer than what it was told.
    first = torch.cat([batch for batch in loader])
    dataset.set_epoch(1)
    second = torch.cat([batch for batch in loader])
    assert len(first) == 188 and len(second) == 288
    assert not torch.equal(first, second[100:])
    assert torch.equal(second, torch.cat(list(dataset)))


def test_goes_on_at_the_exact_row_with_another_world(store: Path) -> None:
    dataset = StoreDataset(store, HEADS, batch_size=30, keys=True, epoch=2)
    batches = iter(dataset)
    found = [next(batches) for _ in range(4)]
    state = pickle.loads(pickle.dumps(dataset.state_dict()))
    batches.close()
    assert state["position"] == 120
    for rank in range(3):
        other = StoreDataset(store, HEADS, batch_size=11, keys=True, rank=rank, world=3)
        other.load_state_dict(state)
        assert other.epoch == 2
        other.set_epoch(2)  # as a loop over epochs does: it is that epoch already
        rest = list(other)
        assert other.state_dict()["position"] == 288
        assert len(list(other)) > len(rest)  # then the epoch from its start
        found += rest
    assert sorted(places(found, dataset.branches)) == sorted(expected(store))


def test_goes_on_behind_a_data_loader(store: Path) -> None:
    def made() -> tuple[StoreDataset, DataLoader]:
        dataset = StoreDataset(store, HEADS, batch_size=25)
        return dataset, DataLoader(dataset, batch_size=None, num_workers=2)

    dataset, loader = made()
    every = list(loader)
    other, rest = made()
    other.load_state_dict(dataset.state_dict(batches=5))
    assert len(rest) == 7
    assert all(torch.equal(a, b) for a, b in zip(rest, every[5:], strict=True))
    again = other.state_dict(batches=3)
    assert again["position"] == 200
    other.set_epoch(1)
    assert len(rest) == 12 and other.state_dict()["position"] == 0


def test_a_worker_says_where_it_goes_on(store: Path) -> None:
    """Loaders that keep the state of each worker give it back to the worker of that number."""
    dataset = StoreDataset(store, HEADS, batch_size=25)
    alone = list(dataset)
    found = {}
    for worker in range(2):
        loader = DataLoader(_Stateful(dataset, skip=None), batch_size=None, num_workers=2)
        state = [state for number, state in loader if number == worker][1]  # after two batches
        loader = DataLoader(_Stateful(dataset, skip=state), batch_size=None, num_workers=2)
        found[worker] = [rows for number, rows in loader if number == worker]
    for worker, rest in found.items():
        want = alone[worker + 4 :: 2]
        assert all(torch.equal(a, b) for a, b in zip(rest, want, strict=True))


class _Stateful(torch.utils.data.IterableDataset):
    """Gives the number of the worker with its states, or with what comes after a state."""

    def __init__(self, dataset: StoreDataset, skip: dict | None):
        self.dataset, self.skip = dataset, skip

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        assert info is not None
        if self.skip is not None:
            self.dataset.load_state_dict(self.skip)
        for batch in self.dataset:
            yield info.id, batch if self.skip else self.dataset.state_dict()


def test_the_state_of_other_rows_is_refused(store: Path) -> None:
    state = StoreDataset(store, HEADS, batch_size=9).state_dict()
    with pytest.raises(InvalidInput, match=r"the state has rows=288, here it is 144; .*filters"):
        StoreDataset(store, HEADS, batch_size=9, branch="cond").load_state_dict(state)
    one, two = (
        StoreDataset(store, HEADS, batch_size=9, branch=each) for each in ("cond", "uncond")
    )
    with pytest.raises(InvalidInput, match="the state has chosen="):
        one.load_state_dict(two.state_dict())
    one, two = (StoreDataset(store, HEADS, batch_size=9, tokens=each) for each in ([0, 1], [2, 3]))
    assert one.rows == two.rows
    with pytest.raises(InvalidInput, match="the state has chosen="):
        one.load_state_dict(two.state_dict())
    with pytest.raises(InvalidInput, match="the state has seed=0, here it is 1"):
        StoreDataset(store, HEADS, batch_size=9, seed=1).load_state_dict(state)


def test_units_that_are_sealed_later_are_not_seen(written) -> None:
    folder = written(units=1)
    dataset = StoreDataset(folder, HEADS, batch_size=40)
    written(units=3)
    assert sum(len(each) for each in dataset) == dataset.rows == 144
    assert StoreDataset(folder, HEADS, batch_size=40).rows == 432


def test_it_says_what_it_is(store: Path) -> None:
    alone = StoreDataset(store, HEADS, batch_size=8)
    assert repr(alone) == f"StoreDataset({HEADS!r}: {alone.rows:,} rows)"
    part = StoreDataset(store, HEADS, batch_size=8, rank=1, world=3)
    assert repr(part) == f"StoreDataset({HEADS!r}: {alone.rows:,} rows, rank 1 of 3)"


def test_normalising(store: Path) -> None:
    mean, scale = torch.randn(12), torch.rand(12)
    plain = torch.cat(list(StoreDataset(store, HEADS, batch_size=99)))
    for normalise, want in (
        ((mean, scale), (plain - mean) * scale),
        ((None, 2), plain * 2),
        ((0.5, None), plain - 0.5),
    ):
        dataset = StoreDataset(store, HEADS, batch_size=99, normalise=normalise)
        assert torch.equal(torch.cat(list(dataset)), want)
        named = StoreDataset(store, HEADS, batch_size=99, normalise=normalise, keys=True)
        assert torch.equal(torch.cat([batch.values for batch in named]), want)
    half = StoreDataset(store, HEADS, batch_size=99, normalise=(mean, scale), dtype=torch.bfloat16)
    assert torch.equal(torch.cat(list(half)), ((plain - mean) * scale).bfloat16())


def test_normalising_to_a_typical_norm(store: Path) -> None:
    norms = []
    for rank in range(2):
        dataset = StoreDataset(
            store, HEADS, batch_size=9, normalise="scale", rank=rank, world=2, seed=rank
        )
        assert dataset.scale is not None and len(dataset.scale.unique()) == 1
        norms += [each.norm(dim=1) for each in dataset]
    assert torch.cat(norms[:16]).mean().item() == pytest.approx(12**0.5, rel=0.1)
    whole = StoreDataset(store, HEADS, batch_size=999, normalise="scale")
    assert next(iter(whole)).norm(dim=1).mean().item() == pytest.approx(12**0.5, rel=1e-5)


def test_memory_is_used_again_but_never_under_a_batch(store: Path) -> None:
    dataset = StoreDataset(store, HEADS, batch_size=10, prefetch=0)
    kept = list(dataset)
    assert len({each.data_ptr() for each in kept}) == len(kept)
    seen = {batch[2:4].data_ptr() for batch in dataset}
    assert len(seen) <= 3 and dataset._own()[1]._free
    views = [batch[1:2] for batch in dataset]
    assert torch.equal(torch.cat(views), torch.cat([each[1:2] for each in kept]))


def test_a_broken_off_iteration_leaves_no_thread(store: Path) -> None:
    dataset = StoreDataset(store, HEADS, batch_size=10)
    for _ in dataset:
        break
    batches = iter(dataset)
    next(batches)
    assert _reading() == 1
    batches.close()
    assert _reading() == 0


def _reading() -> int:
    return sum(each.name.startswith("dreamreader-loader") for each in threading.enumerate())


def test_an_error_of_the_thread_that_reads_ahead_comes_out(store: Path) -> None:
    dataset = StoreDataset(store, HEADS, batch_size=10)
    for file in (store / "shards").glob("*/block.attn*"):
        file.write_bytes(b"")
    with pytest.raises(InvalidInput, match="shards/00000[01]/block.attn@heads.safetensors"):
        list(dataset)


def test_arguments_out_of_their_range(store: Path) -> None:
    def refused(error: type, match: str, site: str = HEADS, **options) -> None:
        with pytest.raises(error, match=match):
            StoreDataset(store, site, **{"batch_size": 5, **options})

    refused(UnknownName, "unknown site 'block.attn'; nearest: block.attn:heads", site="block.attn")
    refused(UnknownName, "unknown branch 'conf'; nearest: cond", branch="conf")
    refused(InvalidInput, "batch_size is an integer from 1 to .*, got 0", batch_size=0)
    refused(InvalidInput, "batch_size is an integer from 1 to .*, got 1.5", batch_size=1.5)
    refused(InvalidInput, "prefetch is an integer from 0 to .*, got -1", prefetch=-1)
    refused(InvalidInput, "world is an integer from 1 to .*, got 0.5", world=0.5)
    refused(InvalidInput, "rank must be 0 .. world - 1, got 2 of 2", rank=2, world=2)
    refused(InvalidInput, "no rows of block.attn:heads with steps=99", steps=99)
    refused(
        InvalidInput, r"no rows of .* with branch='cond', tokens=\[77\]", branch="cond", tokens=[77]
    )
    refused(InvalidInput, "dtype must be one of .* got torch.float64", dtype=torch.float64)
    refused(
        InvalidInput, "are to be normalised, so dtype must be given", dtype=None, normalise=(0, 1)
    )
    refused(
        InvalidInput, r"mean must be a number or \[12\], got \[3\]", normalise=(torch.ones(3), 1)
    )
    refused(InvalidInput, "normalise must be 'scale' or .* got 'mean'", normalise="mean")
    if not torch.cuda.is_available():
        refused(InvalidInput, "pin_memory=True needs a CUDA device", pin_memory=True)


def test_rows_with_scales_need_a_dtype(written) -> None:
    with pytest.raises(InvalidInput, match="are stored with scales, so dtype must be given"):
        StoreDataset(written(stored=torch.int8), HEADS, batch_size=5, dtype=None)


def test_rows_that_were_pooled_have_no_tokens(tmp_path: Path) -> None:
    write(tmp_path, 10, pool="mean")
    with pytest.raises(InvalidInput, match="pooled over tokens, so tokens=0 has none"):
        StoreDataset(tmp_path, "site", batch_size=5, tokens=0)


def write(folder: Path, rows: int, pool: str = "none") -> None:
    """Rows of one feature: the place of the row."""
    writer = ReferenceWriter(folder, run="0" * 64)
    site = writer.site(SiteLayout("site", 1, torch.float32, torch.float32, pool=pool))
    writer.begin(0)
    number = torch.arange(rows)
    zero = 0 * number
    groups = torch.arange(rows + 1) if pool != "none" else None
    places, keys = torch.stack([zero, number], 1), torch.stack([zero, zero, zero, number], 1)
    writer.put(site, number[None, :, None].float(), places.int(), keys.int(), groups=groups)
    writer.seal(pa.table({"id": [0]}), [Moment(0, 0, 0.0, 0.0, 0.0)], ["cond"])
    writer.close()


def test_the_order_is_a_shuffle_over_the_whole_store(tmp_path: Path) -> None:
    rows, bins = 30_000, 20
    write(tmp_path, rows)
    dataset = StoreDataset(tmp_path, "site", batch_size=999)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        order = torch.cat(list(dataset))[:, 0].double().numpy()
        assert np.array_equal(np.sort(order), np.arange(rows))
        # Where rows come from, by when they come: chi-square with (bins - 1)^2 degrees of freedom.
        seen = np.histogram2d(np.arange(rows), order, bins=bins)[0]
        share = rows / bins**2
        chi = ((seen - share) ** 2 / share).sum()
        free = (bins - 1) ** 2
        assert abs(chi - free) < 5 * (2 * free) ** 0.5
        for apart in (1, 2, 999):
            pair = np.corrcoef(order[:-apart], order[apart:])[0, 1]
            assert abs(pair) < 5 / rows**0.5
        assert np.mean(np.abs(np.diff(order)) < 30) < 0.004  # 0.002 by chance


@pytest.mark.parametrize(
    "rows, batch_size, world", [(100, 7, 3), (5, 10, 4), (3, 1, 5), (64, 8, 8)]
)
@pytest.mark.parametrize("start", [0, 2])
def test_the_batches_of_all_ranks_are_the_positions(rows, batch_size, world, start) -> None:
    found = []
    for rank in range(world):
        order = BatchOrder(rows, batch_size, rank, world, drop_last=False)
        for number in range(order.batches(start)):
            first, count = order.batch(start, number)
            assert 0 < count <= batch_size
            found += range(first, first + count)
    assert sorted(found) == list(range(start, rows))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"position": 10**9}, "the state's position is an integer from 0 to"),
        ({"position": -5}, "the state's position is an integer from 0 to"),
        ({"position": 3.5}, "the state's position is an integer from 0 to"),
        ({"epoch": 2**70}, "the state's epoch is an integer from 0 to"),
        ({"epoch": None}, "the state's epoch is an integer from 0 to"),
    ],
)
def test_states_that_nobody_wrote(written, change, said) -> None:
    data = StoreDataset(written(), "block.out", batch_size=4)
    with pytest.raises(InvalidInput, match=said):
        data.load_state_dict(data.state_dict() | change)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": 1.5}, "seed is an integer"),
        ({"seed": True}, "seed is an integer"),
        ({"epoch": -1}, "epoch is an integer from 0"),
        ({"batch_size": 0}, "batch_size is an integer from 1"),
        ({"prefetch": -1}, "prefetch is an integer from 0"),
        ({"rank": -1}, "rank is an integer from 0"),
        ({"world": 0}, "world is an integer from 1"),
        ({"tokens": True}, "tokens: a number, a slice, a range or several numbers, got True"),
        ({"tokens": [0, 1.5]}, "tokens: a number, a slice, a range or several numbers"),
    ],
)
def test_numbers_that_are_none(written, given, said) -> None:
    with pytest.raises(InvalidInput, match=said):
        StoreDataset(written(), "block.out", **({"batch_size": 4} | given))


def test_an_epoch_that_is_none(store: Path) -> None:
    dataset = StoreDataset(store, HEADS, batch_size=4)
    for epoch in (-1, True):
        with pytest.raises(InvalidInput, match=f"epoch is an integer from 0 .*, got {epoch}"):
            dataset.set_epoch(epoch)
