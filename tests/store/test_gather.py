"""Gathering rows: the native form beside the reference, and what both refuse."""

import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from dreamreader._register import native
from dreamreader.errors import InvalidInput
from dreamreader.store.gather import NativeGather, ReferenceGather, open_gather
from dreamreader.store.layout import STORED, Moment, SiteLayout, tensors_of
from dreamreader.store.picking import Picked, pick_rows, tokens_of
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.store import Store

module = native()[0]
needs_native = pytest.mark.skipif(module is None, reason="the native module was not built")
GATHERS = [
    pytest.param(lambda picked: NativeGather(picked, module), id="native", marks=needs_native),
    pytest.param(ReferenceGather, id="reference"),
]
OUT = [torch.float32, torch.bfloat16, torch.float16]
UNITS, ROWS, TOKENS = 2, 304, 8


@pytest.fixture(scope="module", params=list(STORED), ids=str)
def store(request, tmp_path_factory) -> Store:
    """Units of rows of several widths; all of the last ones are too much for the caches."""
    folder = tmp_path_factory.mktemp("gather")
    write(folder, request.param, {"narrow": 7, "wide": 200, "lines": 896})
    return Store(folder)


def write(folder: Path, stored: torch.dtype, sites: dict[str, int], units: int = UNITS) -> None:
    writer = ReferenceWriter(folder, run="0" * 64)
    for unit in range(units):
        writer.begin(unit)
        for name, width in sites.items():
            g = torch.Generator().manual_seed(unit)
            scale = 2.0 ** torch.randint(-30, 15, (ROWS, width), generator=g)
            x = torch.randn(ROWS, width, generator=g) * scale
            x[5, 1], x[6, 0], x[6, 2] = torch.nan, torch.inf, -torch.inf
            number = torch.arange(ROWS)
            keys = [number // TOKENS, 0 * number, number % 2, number * 5 % TOKENS]
            places = torch.stack([0 * number, number], 1).int()
            site = writer.site(SiteLayout(name, width, stored, torch.float32))
            writer.put(site, x[None], places, torch.stack(keys, 1).int())
        samples = pa.table({"id": list(range(ROWS // TOKENS))})
        writer.seal(samples, [Moment(0, 0, 1.0, 1.0, 0.0)], ["cond", "uncond"])
    writer.close()


def picked(store: Store, site: str, tokens=None) -> Picked:
    found = pick_rows(store.segments(site), None if tokens is None else tokens_of(tokens))
    return found if tokens is None else found.keep_counted(ReferenceGather(found).count(1))


def read(gather, rows: int, dtype: torch.dtype, position: int = 0, **options):
    out = torch.full((rows, gather.picked.segments.site.width), torch.nan, dtype=dtype)
    keys = torch.full((rows, 5), -7, dtype=torch.int32)
    gather.read(position, out, keys=keys, **options)
    return out, keys


def same(a, b) -> None:
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@needs_native
@pytest.mark.parametrize(
    ("backend", "kind"),
    [("", NativeGather), ("native", NativeGather), ("reference", ReferenceGather)],
)
def test_the_native_gather_is_taken_unless_it_is_ruled_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, kind: type
) -> None:
    write(tmp_path, torch.float32, {"narrow": 7}, units=1)
    monkeypatch.setenv("DREAMREADER_BACKEND", backend)
    assert type(open_gather(picked(Store(tmp_path), "narrow"))) is kind


@needs_native
@pytest.mark.parametrize("isa", ["portable", "avx2", "best"], indirect=True)
@pytest.mark.parametrize("site", ["narrow", "wide", "lines"])
def test_native_equals_the_reference_bit_for_bit(store: Store, site: str, isa: str) -> None:
    chosen = picked(store, site)
    width = chosen.segments.site.width
    g = torch.Generator().manual_seed(3)
    normal = (torch.randn(width, generator=g), torch.rand(width, generator=g))
    fast, slow = NativeGather(chosen, module), ReferenceGather(chosen)
    for dtype in OUT:
        for each in (None, normal):
            options = {"position": 5, "seed": 2**63 + 5, "normal": each}
            want = read(slow, chosen.total - 5, dtype, verify=False, **options)
            for verify in (True, False):
                found = read(fast, chosen.total - 5, dtype, verify=verify, threads=3, **options)
                same(found, want)


@pytest.mark.parametrize("make", GATHERS)
def test_rows_without_a_seed_are_those_of_the_store(store: Store, make) -> None:
    want = store.read("wide")
    out, keys = read(make(picked(store, "wide")), len(want.values), torch.float32)
    same([out], [want.values.float()])
    assert keys[:, 4].tolist() == want.keys["token"].to_pylist()
    assert keys[:, 0].tolist() == want.keys["unit"].to_pylist()


@pytest.mark.parametrize("make", GATHERS)
@pytest.mark.parametrize("tokens", [0, [1, 6], slice(3, None), slice(0, None, 3), range(5, 2, -2)])
def test_chosen_tokens(tmp_path: Path, make, tokens) -> None:
    write(tmp_path, torch.bfloat16, {"site": 6})
    store = Store(tmp_path)
    wanted = tokens_of(tokens)
    known = list(range(TOKENS))
    if isinstance(tokens, slice):
        numbers = known[tokens]
    else:
        numbers = [tokens] if isinstance(tokens, int) else list(tokens)
    runs = pick_rows(store.segments("site"), wanted)
    counted = runs.keep_counted(make(runs).count(2))
    rows = store.read("site")
    mask = torch.tensor([each in numbers for each in rows.keys["token"].to_pylist()])
    assert counted.total == int(mask.sum()) > 0
    out, keys = read(make(counted), counted.total, torch.bfloat16)
    same([out], [rows.values[mask]])
    assert set(keys[:, 4].tolist()) == set(numbers)
    shuffled = read(make(counted), counted.total, torch.bfloat16, seed=1)[0]
    assert not torch.equal(shuffled, out)
    bits = [each.view(torch.int16).tolist() for each in (shuffled, out)]
    assert sorted(bits[0]) == sorted(bits[1])


@pytest.mark.parametrize(
    "tokens, said",
    [
        (-1, "numbers from 0 on, got -1"),
        ([], r"one or more numbers from 0 on, got \[\]"),
        (slice(-3, None), r"slice\(-3, None, None\) must count forward from 0"),
        (slice(4, 2), "must count forward from 0 and have a token"),
        ("word", "a number, a slice, a range or several numbers, got 'word'"),
    ],
)
def test_tokens_that_cannot_be(tokens, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        tokens_of(tokens)


@needs_native
def test_no_more_files_are_mapped_than_allowed(tmp_path: Path) -> None:
    write(tmp_path, torch.float16, {"site": 4}, units=7)
    chosen = picked(Store(tmp_path), "site")
    few, many = NativeGather(chosen, module, most=3), NativeGather(chosen, module)
    for seed in (1, None):
        same(
            read(few, chosen.total, torch.float16, seed=seed),
            read(many, chosen.total, torch.float16, seed=seed),
        )
    assert few._native.open <= 3
    assert many._native.open == 7
    some = pick_rows(chosen.segments, tokens_of([2, 3]))
    assert (NativeGather(some, module, most=2).count(1) == ReferenceGather(some).count(1)).all()


@pytest.mark.parametrize("make", GATHERS)
@pytest.mark.parametrize("part", ["values", "keys", "scales", "checksums"])
def test_a_damaged_row_is_named(tmp_path: Path, make, part: str) -> None:
    write(tmp_path, torch.int8, {"site": 70}, units=2)
    chosen = picked(Store(tmp_path), "site")
    file = Path(chosen.segments.files[1])
    at = tensors_of(chosen.segments.site, ROWS, 0, 0)
    size = {"values": 70, "keys": 16, "scales": 4, "checksums": 4}[part]
    content = bytearray(file.read_bytes())
    content[getattr(at, part) + 123 * size + size - 1] ^= 0x10
    file.write_bytes(content)
    for seed in (None, 4):
        with pytest.raises(InvalidInput) as error:
            read(make(chosen), chosen.total, torch.float32, seed=seed, threads=2)
        assert f"{file}: row 123 is damaged, its checksum is wrong; run `dreamreader" in str(
            error.value
        )
    read(make(chosen), ROWS + 123, torch.float32)
    read(make(chosen), chosen.total, torch.float32, verify=False)


@pytest.mark.parametrize("make", GATHERS)
def test_a_missing_or_short_shard_is_named(tmp_path: Path, make) -> None:
    write(tmp_path, torch.float32, {"site": 3}, units=2)
    chosen = picked(Store(tmp_path), "site")
    file = Path(chosen.segments.files[1])
    content = file.read_bytes()
    file.write_bytes(content[:9000])
    with pytest.raises(InvalidInput, match=f"{file} has 9,000 bytes"):
        read(make(chosen), chosen.total, torch.float32)
    file.unlink()
    with pytest.raises(InvalidInput, match=f"{file} (is missing|cannot be opened: No such file)"):
        read(make(chosen), chosen.total, torch.float32)
    out, _ = read(make(chosen), ROWS, torch.float32)  # of the other shard
    assert out[0].isfinite().all()


# In a process of its own, which would end by SIGBUS.
CUT = """
import os, sys
from functools import partial
from pathlib import Path
from dreamreader.errors import InvalidInput
from tests.store.test_gather import *

folder = Path(sys.argv[1])
for n, bytes in enumerate((9_000, 20_000, 8192 + 2 * 200 * ROWS + 100, -100, 0)):
    for tokens in (None, [1, 6]):
        for verify in (True, False):
            for make in (lambda p: NativeGather(p, module), ReferenceGather):
                own = folder / f"{n}-{tokens}-{verify}-{make is ReferenceGather}"
                write(own, torch.bfloat16, {"site": 200})
                runs = picked(Store(own), "site", tokens)
                gather, file = make(runs), Path(runs.segments.files[1])
                whole = read(gather, runs.total, torch.float32, seed=3, threads=2)
                end = tensors_of(runs.segments.site, ROWS, 0, 0).checksums + 4 * ROWS
                size = bytes if bytes >= 0 else end + bytes
                content = file.read_bytes()
                os.truncate(file, size)
                calls = [dict(seed=3, verify=verify, threads=2), dict(position=5)]
                calls = [partial(read, gather, runs.total - 5, torch.float32, **c) for c in calls]
                for call in calls + [partial(gather.count, 2)] * (tokens is not None):
                    try:
                        call()
                    except InvalidInput as error:
                        assert f"{file} has {size:,} bytes, its rows need" in str(error), error
                    else:
                        raise AssertionError(f"{own}: nothing was said")
                file.write_bytes(content)
                again = read(gather, runs.total, torch.float32, seed=3, threads=2)
                same(again, whole)
print("all said")
"""


@needs_native
def test_a_shard_that_is_cut_off_while_it_is_mapped_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", CUT, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "all said\n"), done.stderr[-3000:]


SIGNALS = """
import ctypes, faulthandler, mmap, os, signal, sys
from pathlib import Path
from tests.store.test_gather import *

folder = Path(sys.argv[1])
write(folder, torch.float32, {"site": 3})
runs = picked(Store(folder), "site")
gather = NativeGather(runs, module)
read(gather, runs.total, torch.float32)
faulthandler.enable()  # takes the signal away; the next reading takes it back
read(gather, runs.total, torch.float32)
other = folder / "other"
other.write_bytes(bytes(8192))
with open(other, "r+b") as file:
    there = mmap.mmap(file.fileno(), 8192)
    os.truncate(other, 0)
    print("before", flush=True)
    there[5000] if sys.argv[2] == "touched" else os.kill(os.getpid(), signal.SIGBUS)
"""


@needs_native
@pytest.mark.parametrize("how", ["touched", "sent"])
def test_other_errors_of_the_bus_go_where_they_went(tmp_path: Path, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALS, str(tmp_path), how],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "before\n")
    assert "Fatal Python error: Bus error" in done.stderr  # the other handler


@pytest.mark.parametrize("make", GATHERS)
def test_a_view_with_another_sign_is_the_numbers_that_it_stands_for(tmp_path: Path, make) -> None:
    write(tmp_path, torch.float32, {"site": 3}, units=1)
    gather = make(picked(Store(tmp_path), "site"))
    mean, plain = torch.randn(3, dtype=torch.complex64).conj().imag, torch.empty(2, 3)
    assert mean.is_neg()
    gather.read(0, plain, normal=(mean, torch.ones(3)))
    want = torch.empty(2, 3)
    gather.read(0, want, normal=(mean.resolve_neg(), torch.ones(3)))
    assert torch.equal(plain, want)


@needs_native
def test_the_native_gather_refuses_what_is_not_safe(tmp_path: Path) -> None:
    write(tmp_path, torch.float32, {"site": 3}, units=1)
    chosen = picked(Store(tmp_path), "site")
    gather = NativeGather(chosen, module)
    for out, position in (
        (torch.empty(2, 4), 0),
        (torch.empty(2, 3, dtype=torch.float64), 0),
        (torch.empty(3, 2).T, 0),
        (torch.empty(2, 3), chosen.total - 1),
        (torch.empty(2, 3), -1),
        (torch.empty(2, 3), 2**63 - 1),
    ):
        with pytest.raises(ValueError, match="gather: "):
            gather.read(position, out)
    with pytest.raises(ValueError, match="threads must be positive"):
        gather.read(0, torch.empty(2, 3), threads=0)
    with pytest.raises(InvalidInput, match="out is a negative view"):
        gather.read(0, torch.zeros(2, 3, dtype=torch.complex64).conj().imag)
    with pytest.raises(ValueError, match="keys must be dense int32"):
        gather.read(0, torch.empty(2, 3), keys=torch.zeros(2, 5, dtype=torch.int64))
    outside = Picked(
        chosen.segments, None, chosen.file, chosen.first + 1, chosen.rows, chosen.start
    )
    with pytest.raises(ValueError, match="a run is outside its file"):
        NativeGather(outside, module)
