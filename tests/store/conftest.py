"""A small store that is written by the reference."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from dreamreader._register import native
from dreamreader.store.layout import Moment, SiteLayout
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.writer import NativeWriter

STEPS = 3


def fill(writer, units: int = 2, stored: torch.dtype = torch.bfloat16, samples: int = 4) -> None:
    """Units of two sites (widths 12 and 7), three steps, two branches; random tokens at the second.

    Every value is drawn from a generator of its own for each unit, site and step.
    """
    sites = [
        SiteLayout("block.attn:heads", 12, stored, torch.float32, heads=3),
        SiteLayout("block.out", 7, torch.float32, torch.float32, hw=(2, 3)),
    ]
    times = [Moment(n, 0, 999.0 - 300 * n, 1.5 / (n + 1), n / STEPS) for n in range(STEPS)]
    for unit in range(units):
        writer.begin(unit)
        for step in range(STEPS):
            for number, layout in enumerate(sites):
                g = torch.Generator().manual_seed(1000 * unit + 10 * step + number)
                x = torch.randn(2 * samples, 6, layout.width, generator=g)
                tokens = torch.arange(6) if number == 0 else torch.randperm(6, generator=g)[:2]
                entry = torch.arange(2 * samples).repeat_interleave(len(tokens))
                token = tokens.repeat(2 * samples)
                keys = torch.stack(
                    [entry % samples, torch.full_like(entry, step), entry // samples, token], 1
                )
                places = torch.stack([entry, token], 1)
                writer.put(writer.site(layout), x, places.int(), keys.int())
        columns = {
            "id": [f"{unit}-{n}" for n in range(samples)],
            "prompt": [f"prompt {n} of unit {unit}" for n in range(samples)],
            "seed": list(range(samples)),
        }
        writer.seal(pa.table(columns), times, ["cond", "uncond"])


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with sealed units, by the reference."""

    def make(name: str = "store", run: str = "0" * 64, **options) -> Path:
        folder = tmp_path / name
        writer = ReferenceWriter(folder, run)
        fill(writer, **options)
        writer.close()
        return folder

    return make


@pytest.fixture
def native_writer(tmp_path: Path) -> Iterator[Callable[..., NativeWriter]]:
    """Opens native writers, with few threads and little memory, and closes them."""
    writers: list[NativeWriter] = []

    def writer(name: str = "store", *, slow: int = 0, **options) -> NativeWriter:
        options = {"ring_bytes": 1 << 18, "threads": 2, "pressure": "block"} | options
        leave_out = options["pressure"] == "sample"
        module = native()[0]
        assert module
        core = module.ShardWriter(
            options["ring_bytes"], 4 << 20, options["threads"], 1, leave_out, slow
        )
        writers.append(NativeWriter(tmp_path / name, "0" * 64, core))
        return writers[-1]

    yield writer
    for each in writers:
        each.close()
