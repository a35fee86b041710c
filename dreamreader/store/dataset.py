"""Training from a store: batches of its rows in a shuffled order, without loading it."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dreamreader.errors import InvalidInput
from dreamreader.store.batch import Batch, Names
from dreamreader.store.buffers import Buffers
from dreamreader.store.gather import FOUND, Gather, open_gather
from dreamreader.store.layout import SiteLayout
from dreamreader.store.order import BatchOrder, seed_of
from dreamreader.store.picking import TOKENS, Picked, pick_rows, tokens_of
from dreamreader.store.store import Store

_OUT = (torch.float32, torch.bfloat16, torch.float16)
_SAMPLE = 8192  # rows from which normalise="scale" takes the norm
_Normal = tuple[Tensor, Tensor]  # mean and scale, float32 [width]
_T = TypeVar("_T")


class StoreDataset(IterableDataset):
    """Gives batches of the rows of a site, shuffled over the whole store, each row once an epoch.

    Formula: the row at position p of an epoch is number permuted(p) of the chosen rows; batch k of
        a rank starts at position (k world + rank) batch_size. What is left after the last round of
        full batches is shared out evenly over the ranks.

    What is chosen is what the store has now: units that are sealed later are not seen. Memory does
    not grow with the rows; with `tokens` it does by 0.1 byte for each, and their keys (16 bytes for
    each row of the site) are read once.

    Args:
        store: its folder, or a `Store`.
        site: whose rows.
        batch_size: rows of a batch.
        steps: as `Record` takes them. branch: one or several.
        tokens: a number, several, a range or a slice; all by default.
        seed, epoch: the order. shuffle: False gives the order of the store.
        rank, world: number of this process, and how many processes share the rows out.
        normalise: (mean, scale) gives (x - mean) * scale, each a number, a tensor [width] or None;
            "scale" multiplies all rows with one number, so that their norm is sqrt(width) in the
            mean over 8192 rows (the same for every rank, seed and epoch).
        dtype: of the batches; None as stored, where that is without scales.
        keys: gives `Batch` in place of the rows alone.
        drop_last: leaves out what does not fill a batch of every rank.
        prefetch: batches that a thread reads ahead; 0 reads when asked.
        pin_memory: reads into memory that a GPU copies from by itself.
        verify: checks every row against its checksum.

    Raises:
        UnknownName: the store has no such site or branch.
        InvalidInput: no row is chosen, or an argument is out of its range; while reading, a shard
            is missing or a row is damaged.

    Example:
        >>> dataset = StoreDataset("activations", "unet.mid_block", batch_size=4096, steps=range(5))
        >>> for epoch in range(3):
        ...     dataset.set_epoch(epoch)
        ...     for batch in dataset:
        ...         train(batch)
    """

    def __init__(
        self,
        store: str | Path | Store,
        site: str,
        *,
        batch_size: int,
        steps: Any = None,
        branch: str | Sequence[str] | None = None,
        tokens: TOKENS | None = None,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        normalise: Literal["scale"] | tuple[Any, Any] | None = None,
        dtype: torch.dtype | None = torch.float32,
        keys: bool = False,
        drop_last: bool = False,
        prefetch: int = 2,
        pin_memory: bool = False,
        verify: bool = True,
    ):
        _whole("batch_size", batch_size, 1)
        _whole("prefetch", prefetch, 0)
        _whole("rank", rank, 0)
        _whole("world", world, 1)
        if not 0 <= rank < world:
            raise InvalidInput(f"StoreDataset: rank must be 0 .. world - 1, got {rank} of {world}")
        _whole("seed", seed, -(2**63))
        _whole("epoch", epoch, 0)
        if pin_memory and not torch.cuda.is_available():
            raise InvalidInput("StoreDataset: pin_memory=True needs a CUDA device")
        store = store if isinstance(store, Store) else Store(store)
        self._picked = _pick(store, site, steps, branch, tokens)
        self.site = self._picked.segments.site
        self.dtype = _dtype(self.site, dtype, normalise is not None)
        self.order = BatchOrder(self._picked.total, batch_size, rank, world, drop_last)
        self.seed, self.shuffle, self.prefetch, self.verify = seed, shuffle, prefetch, verify
        self._pinned = pin_memory
        self._names = Names(self._picked.segments.files) if keys else None
        self._here: tuple[int, Gather, Buffers] | None = None
        # Shared, so that workers that stay for several epochs see what `set_epoch` says.
        self._epoch = torch.tensor(epoch, dtype=torch.int64).share_memory_()
        self._start = (epoch, 0)  # an epoch, and the position from which it is read
        self._at = 0  # the position up to which rows were given
        self._normal = None if normalise is None else self._normal_of(normalise)

    @property
    def rows(self) -> int:
        """Rows of an epoch, of all ranks."""
        return self.order.rows

    @property
    def branches(self) -> tuple[str, ...]:
        """Names that `Batch.branch` stands for; empty without `keys=True`."""
        return self._names.branches if self._names else ()

    @property
    def mean(self) -> Float[Tensor, " width"] | None:
        """What is subtracted from rows; None where nothing is."""
        return self._normal[0] if self._normal else None

    @property
    def scale(self) -> Float[Tensor, " width"] | None:
        """What rows are multiplied with then; None where they are not."""
        return self._normal[1] if self._normal else None

    @property
    def epoch(self) -> int:
        """The epoch of the next iteration."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; another one than now is read from its start."""
        _whole("epoch", epoch, 0)
        if epoch != self.epoch:
            self._epoch.fill_(epoch)
            self._start, self._at = (epoch, 0), 0

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Says up to where rows were given, for `load_state_dict`.

        Args:
            batches: how many batches a `DataLoader` gave since it was started, where its workers
                iterate and this object does not; those of this object's iteration by default.

        Returns:
            Plain values. The same on every rank, as long as all gave the same number of batches.
        """
        at = self._at if batches is None else self.order.after(self._start[1], batches)
        return {"position": at, "epoch": self.epoch, **self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Has iterations of the state's epoch start at the first row that was not given yet.

        Batch size, rank, world and what is done with the rows may be others than before. Until
        `set_epoch` is called with another epoch, or this object's iteration has come to its end,
        every iteration starts there.

        Raises:
            InvalidInput: it is the state of other rows, or of another order, or none at all.
        """
        for name, own in self.identity().items():
            if state.get(name) != own:
                raise InvalidInput(
                    f"StoreDataset: the state has {name}={state.get(name)!r}, here it is {own!r}; "
                    "it goes on with the same units, site, filters, seed and shuffle only"
                )
        epoch = _whole("the state's epoch", state.get("epoch"), 0)
        position = _whole("the state's position", state.get("position"), 0, self.rows + 1)
        self._epoch.fill_(epoch)
        self._start, self._at = (epoch, position), position

    def __len__(self) -> int:
        """Batches of this rank, from where the next iteration starts."""
        return self.order.batches(self._from())

    def __repr__(self) -> str:
        share = f", rank {self.order.rank} of {self.order.world}" if self.order.world > 1 else ""
        return f"StoreDataset({self.site.name!r}: {self.rows:,} rows{share})"

    def __iter__(self) -> Iterator[Float[Tensor, "rows width"] | Batch]:
        worker = get_worker_info()
        first, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        start, epoch = self._from(), self.epoch
        self._start, self._at = (epoch, start), start
        # In the thread that reads ahead, torch would name the threads of that thread.
        options = {"verify": self.verify, "threads": torch.get_num_threads()}
        options["seed"] = seed_of(self.seed, epoch) if self.shuffle else None

        def read(number: int) -> Tensor | Batch:
            return self._read(*self.order.batch(start, number), **options)

        numbers = range(first, self.order.batches(start), workers)
        for batch in _ahead(read, numbers, self.prefetch):
            # Of all workers: each gives its state for as many rounds as there are workers.
            self._at = self.order.after(self._at, workers)
            yield batch
        self._start, self._at = (epoch, 0), self.rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_here": None}

    def _from(self) -> int:
        return self._start[1] if self._start[0] == self.epoch else 0

    def identity(self) -> dict[str, Any]:
        """What tells these rows and their order from others."""
        return {
            "rows": self.rows,
            "chosen": self._picked.digest(),
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def _read(self, position: int, rows: int, **options: Any) -> Tensor | Batch:
        gather, buffers = self._own()
        values = buffers.take(rows)
        if self._names is None:
            gather.read(position, values, normal=self._normal, **options)
            return values
        keys = torch.empty(rows, len(FOUND), dtype=torch.int32)
        gather.read(position, values, normal=self._normal, keys=keys, **options)
        return self._names.batch(values, keys)

    def _own(self) -> tuple[Gather, Buffers]:
        """Mappings and memory of this process: a fork may happen while another thread reads."""
        if self._here is None or self._here[0] != os.getpid():
            buffers = Buffers(self.order.batch_size, self.site.width, self.dtype, self._pinned)
            self._here = (os.getpid(), open_gather(self._picked), buffers)
        return self._here[1:]

    def _normal_of(self, normalise: Literal["scale"] | tuple[Any, Any]) -> _Normal:
        width = self.site.width
        if isinstance(normalise, str):
            if normalise != "scale":
                raise InvalidInput(
                    f"StoreDataset: normalise must be 'scale' or (mean, scale), got {normalise!r}"
                )
            return torch.zeros(width), torch.full((width,), self._typical())
        mean, scale = normalise
        return _vector("mean", mean, 0.0, width), _vector("scale", scale, 1.0, width)

    def _typical(self) -> float:
        """sqrt(width) over the mean norm of some rows."""
        some = torch.empty(min(self.rows, _SAMPLE), self.site.width)
        threads = torch.get_num_threads()
        self._own()[0].read(0, some, seed=seed_of(0, 0), verify=self.verify, threads=threads)
        norm = float(some.double().norm(dim=1).mean())
        if not (norm > 0 and math.isfinite(norm)):
            raise InvalidInput(
                f"StoreDataset: the mean norm of {len(some):,} rows of {self.site.name} is {norm}: "
                "no scale follows from it"
            )
        return math.sqrt(self.site.width) / norm


def _pick(store: Store, site: str, steps: Any, branch: Any, tokens: TOKENS | None) -> Picked:
    segments = store.segments(site, steps, branch)
    wanted = None if tokens is None else tokens_of(tokens)
    if wanted is not None and segments.site.pool != "none":
        raise InvalidInput(
            f"{site}: its rows are pooled over tokens, so tokens={tokens!r} has none"
        )
    picked = pick_rows(segments, wanted)
    if wanted is not None and picked.total:
        picked = picked.keep_counted(open_gather(picked).count(torch.get_num_threads()))
    if picked.total == 0:
        chosen = ", ".join(
            f"{name}={value!r}"
            for name, value in (("steps", steps), ("branch", branch), ("tokens", tokens))
            if value is not None
        )
        raise InvalidInput(
            f"{store.path}: no rows of {site}" + (f" with {chosen}" if chosen else " yet")
        )
    return picked


def _dtype(site: SiteLayout, dtype: torch.dtype | None, normalised: bool) -> torch.dtype:
    if dtype is None:
        if site.scaled or normalised:
            why = "are to be normalised" if normalised else "are stored with scales"
            raise InvalidInput(f"{site.name}: rows {why}, so dtype must be given")
        return site.stored
    if dtype not in _OUT:
        raise InvalidInput(f"StoreDataset: dtype must be one of {_OUT} or None, got {dtype}")
    return dtype


def _vector(name: str, value: Any, default: float, width: int) -> Float[Tensor, " width"]:
    given = default if value is None else value
    found = torch.as_tensor(given, dtype=torch.float32, device="cpu").detach()
    if found.shape not in ((), (width,)):
        raise InvalidInput(
            f"StoreDataset: {name} must be a number or [{width}], got {list(found.shape)}"
        )
    return found.expand(width).contiguous()


def _ahead(read: Callable[[int], _T], numbers: range, ahead: int) -> Iterator[_T]:
    """Results of calls, of which a thread does the next ones meanwhile."""
    if ahead == 0:
        yield from map(read, numbers)
        return
    pool = ThreadPoolExecutor(1, "dreamreader-loader")
    waiting: deque[Future[_T]] = deque()
    try:
        for number in numbers:
            waiting.append(pool.submit(read, number))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _whole(name: str, value: Any, start: int, stop: int = 2**63) -> int:
    """The value, where it is an integer of a range."""
    if isinstance(value, bool) or not isinstance(value, int) or not start <= value < stop:
        raise InvalidInput(
            f"StoreDataset: {name} is an integer from {start:,} to {stop - 1:,}, got {value!r}"
        )
    return value
