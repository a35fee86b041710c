"""Gathering rows by their places: in C++ (csrc/gather.h), else with numpy and torch."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader._register import chosen_backend, native
from dreamreader.errors import InvalidInput
from dreamreader.ops.permutation import permuted
from dreamreader.store.layout import STORED
from dreamreader.store.picking import Picked
from dreamreader.store.shard import ADVICE, ShardFile, damaged_row, open_shard

FOUND = ("file", "sample", "moment", "branch", "token")  # columns of `keys`, int32
_MAPPED = 16_384  # files; Linux allows a process 65,530 mappings


class Gather(Protocol):
    """Reads wanted rows by their places among all that are wanted."""

    def count(self, threads: int) -> Int[np.ndarray, " runs"]:
        """How many rows of each run have a wanted token."""
        ...

    def read(
        self,
        position: int,
        out: Float[Tensor, "rows width"],
        *,
        seed: int | None = None,
        normal: tuple[Float[Tensor, " width"], Float[Tensor, " width"]] | None = None,
        keys: Int[Tensor, "rows 5"] | None = None,
        verify: bool = True,
        threads: int = 1,
    ) -> None:
        """Fills `out` with the rows at position, position + 1, ...

        Formula: out = (x - mean) * scale; x times the scale of its row where it is stored with one

        Args:
            out: dense; what is stored is converted to its dtype.
            seed: of the permutation of all places; None leaves them in the order of the store.
            normal: mean and scale, float32.
            keys: filled with the columns FOUND.
            verify: checks every row against its checksum.

        Raises:
            InvalidInput: a file is missing or short, or a row is damaged.
        """
        ...


def open_gather(picked: Picked) -> Gather:
    """The native gather where it was built, else the reference."""
    module: Any = native()[0] if chosen_backend() in (None, "native") else None
    return ReferenceGather(picked) if module is None else NativeGather(picked, module)


class NativeGather:
    """The gather in C++; maps files when they are needed, and holds no more than `most`."""

    def __init__(self, picked: Picked, module: Any, most: int = _MAPPED):
        self.picked = picked
        segments = picked.segments
        self._native = module.Gather(
            segments.files,
            *(
                torch.from_numpy(np.ascontiguousarray(each))
                for each in (
                    segments.file_rows.astype(np.int64),
                    picked.file,
                    picked.first,
                    picked.start,
                )
            ),
            list(STORED).index(segments.site.stored),
            segments.site.width,
            most,
        )
        if (tokens := picked.tokens) is not None:
            rows = torch.from_numpy(picked.rows)
            self._native.choose(rows, tokens.begin, tokens.span, tokens.every, tokens.table)

    def count(self, threads: int) -> Int[np.ndarray, " runs"]:
        counts = np.zeros(len(self.picked.rows), np.int64)
        self._raise_problem(self._native.count(torch.from_numpy(counts), threads))
        return counts

    def read(
        self,
        position: int,
        out: Tensor,
        *,
        seed: int | None = None,
        normal: tuple[Tensor, Tensor] | None = None,
        keys: Tensor | None = None,
        verify: bool = True,
        threads: int = 1,
    ) -> None:
        mean, scale = normal or (None, None)
        if out.is_neg():  # C++ would see the numbers without their sign
            raise InvalidInput("out is a negative view (x.conj().imag is one); give a plain tensor")
        mean, scale = (each if each is None else each.resolve_neg() for each in (mean, scale))
        self._raise_problem(
            self._native.read(position, seed, out, mean, scale, keys, verify, threads)
        )

    def _raise_problem(self, problem: tuple[str, int, int, str] | None) -> None:
        if problem is None:
            return
        kind, number, row, detail = problem
        file = self.picked.segments.files[number]
        if kind == "checksum":
            raise damaged_row(file, row)
        if kind == "short":
            raise InvalidInput(f"{file} has {int(detail):,} bytes, its rows need {row:,}{ADVICE}")
        if kind == "read":
            raise InvalidInput(f"{file} cannot be read: {detail}{ADVICE}")
        raise InvalidInput(f"{file} cannot be opened: {detail}{ADVICE}")


class ReferenceGather:
    """The definition of the gather, in numpy and torch; holds every file that it has read."""

    def __init__(self, picked: Picked):
        self.picked = picked
        self._shards: dict[int, ShardFile] = {}

    def count(self, threads: int) -> Int[np.ndarray, " runs"]:
        p, tokens = self.picked, self.picked.tokens
        assert tokens is not None
        return np.array(
            [
                tokens.is_wanted(self._shard(file).keys[first : first + rows][:, 3]).sum()
                for file, first, rows in zip(p.file.tolist(), p.first, p.rows, strict=True)
            ],
            np.int64,
        )

    def read(
        self,
        position: int,
        out: Tensor,
        *,
        seed: int | None = None,
        normal: tuple[Tensor, Tensor] | None = None,
        keys: Tensor | None = None,
        verify: bool = True,
        threads: int = 1,
    ) -> None:
        places = np.arange(position, position + len(out), dtype=np.int64)
        if seed is not None and len(places):
            places = permuted(places, self.picked.total, seed)
        file, row = self._locate(places)
        for number in np.unique(file).tolist():
            lines = np.flatnonzero(file == number)
            values, own = self._read_rows(number, row[lines], verify)
            at = torch.from_numpy(lines)
            if normal is not None:
                values = (values.float() - normal[0]) * normal[1]
            out[at] = values.to(out.dtype)
            if keys is not None:
                keys[at, 0] = number
                keys[at, 1:] = torch.from_numpy(own)

    def _locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """File and row of each place among the wanted rows."""
        p = self.picked
        run, within = p.runs_of(places)
        if p.tokens is None:
            return p.file[run], p.first[run] + within
        row = np.empty(len(places), np.int64)
        for n, (file, first, rows) in enumerate(
            zip(p.file[run].tolist(), p.first[run], p.rows[run], strict=True)
        ):
            token = self._shard(file).keys[first : first + rows][:, 3]
            row[n] = first + np.flatnonzero(p.tokens.is_wanted(token))[within[n]]
        return p.file[run], row

    def _read_rows(self, number: int, row: np.ndarray, verify: bool) -> tuple[Tensor, np.ndarray]:
        """Values and keys of rows of one file."""
        shard = self._shard(number)
        values, keys = shard.values[row], shard.keys[row]
        scales = None if shard.scales is None else shard.scales[row]
        if verify:
            shard.check_rows(row, values, keys, scales)
        stored = torch.from_numpy(values).view(shard.site.stored)
        if scales is not None:
            stored = stored.float() * torch.from_numpy(scales)[:, None]
        return stored, keys

    def _shard(self, number: int) -> ShardFile:
        if number not in self._shards:
            self._shards[number] = open_shard(Path(self.picked.segments.files[number]))
        return self._shards[number]
