"""A training that torchrun starts in several processes: who writes, and who follows."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dreamreader.errors import InvalidInput
from dreamreader.fitting.run import CHECKPOINT
from dreamreader.sae.ranks import Ranks

_LOCAL = "LOCAL_RANK"
_PATIENCE = timedelta(days=7)  # rank 0 runs the model and measures while others wait


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks | None]:
    """The processes that torchrun started; None where it did not, or started one alone.

    Args:
        device: of the autoencoders.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield None
        return
    if dist.is_initialized():
        yield Ranks()
        return
    of_gpus = device.startswith("cuda")
    if of_gpus:
        torch.cuda.set_device(device_of_rank(device))
    dist.init_process_group("nccl" if of_gpus else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def device_of_rank(device: str) -> str:
    """`cuda` in a process of torchrun is the GPU of its number on the machine."""
    return f"cuda:{os.environ[_LOCAL]}" if device == "cuda" and _LOCAL in os.environ else device


def check_shares(batch_size: int, world: int) -> None:
    """Refuses batches that cannot be shared evenly.

    Raises:
        InvalidInput: says the nearest sizes.
    """
    if batch_size % world:
        below = batch_size // world * world
        near = f"{below} or {below + world}" if below else f"{world}"
        raise InvalidInput(
            f"training.batch_size: {batch_size} rows cannot be shared evenly by {world} processes; "
            f"take {near}"
        )


def check_pools(update_every: Iterable[int | None]) -> None:
    """Refuses pools that are kept for several steps: each process has its own, checkpoints one.

    Raises:
        InvalidInput: one is.
    """
    if any((each or 1) > 1 for each in update_every):
        raise InvalidInput(
            "autoencoders.update_every: processes choose pools by their own rows, and a checkpoint "
            "keeps those of one; leave it out, or train in one process"
        )


@contextmanager
def led_by_rank_0(folder: Path) -> Iterator[None]:
    """In rank 0: tells the others in the end that all is there.

    An error is not told: the process ends, and torchrun ends the others.
    """
    yield
    _share({"done": folder})


def announce_site(folder: Path, site: str, run: str, checkpoint: Path) -> None:
    """In rank 0: has the others train a site too, from the same checkpoint."""
    _share({"folder": folder, "site": site, "run": run, "checkpoint": checkpoint})
    dist.barrier()  # until they have copied it


def follow_rank_0(train: Callable[[Path, str, str, Path | None], None]) -> Path:
    """In other ranks: trains the sites that rank 0 names, and gives the folder of the result.

    Args:
        train: takes the folder, a site, the run, and a folder with the checkpoint, which is a copy.
    """
    while True:
        told = _share(None)
        if "done" in told:
            return told["done"]
        with tempfile.TemporaryDirectory(prefix="dreamreader-rank-") as own:
            there = told["checkpoint"] / CHECKPOINT
            if there.is_file():
                shutil.copy(there, Path(own) / CHECKPOINT)
            dist.barrier()
            train(told["folder"], told["site"], told["run"], Path(own))


def _share(told: dict[str, Any] | None) -> dict[str, Any]:
    """What rank 0 gives to all."""
    listed: list[Any] = [told]
    dist.broadcast_object_list(listed, src=0)
    return listed[0]
