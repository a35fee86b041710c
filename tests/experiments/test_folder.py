"""Run folders: whole files, damaged files, full disks, other processes."""

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from dreamreader._checked import read_json, write_json
from dreamreader.errors import InvalidInput
from dreamreader.experiments import load_results
from dreamreader.experiments.folder import FORMAT, RunFolder
from dreamreader.experiments.row import RowBatch

UNITS = [RowBatch(0, 0, 2), RowBatch(1, 2, 3)]


def begun(path: Path) -> RunFolder:
    """A folder that says of which run it is."""
    folder = RunFolder(path)
    folder.write("fingerprint.json", {"digest": "ab" * 32})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Two batches, written."""
    found = begun(tmp_path / "run")
    rows = [{"row": n, "score": None if n < 2 else 0.5, "prompt": "é"} for n in range(3)]
    for unit in UNITS:
        found.write_unit(unit, rows[unit.start : unit.stop], ["score"], [{"calls": unit.number}])
    return found


def test_batches_become_one_table(folder: RunFolder) -> None:
    assert folder.finished_units(UNITS) == {0, 1} and folder.has_results and not folder.is_complete
    folder.merge(UNITS)
    folder.clear(UNITS)
    assert folder.is_complete and not (folder.path / "rows").exists()
    rows, measured = folder.table()
    assert [row["row"] for row in rows] == [0, 1, 2] and measured == ["score"]
    assert [row["score"] for row in rows] == [None, None, 0.5] and rows[0]["prompt"] == "é"
    assert folder.firing() == [[{"calls": 0}], [{"calls": 1}]]


def test_a_batch_that_is_half_there_is_named_and_not_read(folder: RunFolder) -> None:
    file = folder.path / "rows" / "batch-000001.parquet"
    whole = file.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        text = (
            "batch-000001.parquet is damaged .*; delete it and run again: its 1 rows are computed"
        )
        with pytest.raises(InvalidInput, match=text):
            folder.merge(UNITS)
        assert not folder.is_complete
    file.write_bytes((folder.path / "rows" / "batch-000000.parquet").read_bytes())
    with pytest.raises(
        InvalidInput, match=r"batch-000001.parquet does not hold rows 2 .. 2; delet"
    ):
        folder.merge(UNITS)


def test_a_whole_batch_of_other_rows_is_refused(tmp_path: Path) -> None:
    folder, units = begun(tmp_path / "run"), [RowBatch(0, 0, 2), RowBatch(1, 2, 4)]
    for unit in units:
        folder.write_unit(unit, [{"row": n} for n in range(unit.start, unit.stop)], [], [])
    first, second = (folder.path / "rows" / f"batch-00000{n}.parquet" for n in (0, 1))
    shutil.copyfile(first, second)
    with pytest.raises(InvalidInput, match="batch-000001.parquet does not hold rows 2 .. 3; del"):
        folder.merge(units)


def test_any_flipped_bit_in_the_rows_is_noticed(folder: RunFolder) -> None:
    folder.merge(UNITS)
    whole = folder.rows_file.read_bytes()
    for place in range(0, len(whole), 3):  # pages and footer
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        folder.rows_file.write_bytes(changed)
        with pytest.raises(InvalidInput, match="rows.parquet is damaged .*; restore it, or delete"):
            folder.table()
    folder.rows_file.write_bytes(whole)
    assert len(folder.table()[0]) == 3


def test_files_of_another_run_are_refused(folder: RunFolder, tmp_path: Path) -> None:
    folder.keep_tensors("x", {"x": torch.ones(2)})
    folder.merge(UNITS)
    other = RunFolder(tmp_path / "other")
    shutil.copytree(folder.path, other.path)
    other.write("fingerprint.json", {"digest": "cd" * 32})
    for read in (
        other.table,
        other.firing,
        lambda: other.tensors("x"),
        lambda: other.read_unit(UNITS[0]),
    ):
        with pytest.raises(InvalidInput, match=r"is damaged \(it is of another run"):
            read()


def test_damaged_json_and_tensors_are_named(folder: RunFolder) -> None:
    (folder.path / "plan.json").write_text('{"format": ')
    with pytest.raises(InvalidInput, match="plan.json is damaged .*; start in another folder"):
        folder.plan()
    assert folder.tensors("none") is None and folder.read("none.json") is None
    folder.keep_tensors("a/b", {"x": torch.arange(6).reshape(2, 3).T})
    found = folder.tensors("a/b")
    assert found is not None and torch.equal(found["x"], torch.arange(6).reshape(2, 3).T)
    file = folder.path / "artifacts" / "a" / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InvalidInput, match="b.safetensors is damaged .*; delete it and run again"):
        folder.tensors("a/b")


def test_a_table_needs_a_complete_run(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="none is no run folder"):
        RunFolder(tmp_path / "none").table()
    with pytest.raises(InvalidInput, match="run is not complete: run it again to go on"):
        folder.table()


def test_one_process_at_a_time(experiment, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = (
        "import fcntl, sys, time\n"
        f"lock = open({str(out / '.lock')!r}, 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    out.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    try:
        with pytest.raises(InvalidInput, match="run: another process runs here"):
            experiment().run(out)
        assert sorted(f.name for f in out.iterdir()) == [".lock"]
    finally:
        other.kill()
        other.communicate()
    assert len(experiment().run(out).rows) == 6


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyError), folder.lock():
        raise KeyError
    text = "run: another process runs here"
    with folder.lock(), pytest.raises(InvalidInput, match=text), RunFolder(folder.path).lock():
        pass


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A real fault of the system: writing beyond so many bytes fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


METHODS = {
    "edit": None,
    "steer": {
        "kind": "steer",
        "sites": "unet.**.attn2",
        "fit": {"prompts": [{"prompt": "a red star", "target": "a blue star"}]},
        "fit_seeds": {"count": 2},
        "branch": "cond",
        "strengths": [1.0],
        "controls": [],
    },
}


@pytest.mark.parametrize("kind", list(METHODS))
@pytest.mark.parametrize("size", [500, 5000, 9000, 20_000, 60_000])
def test_a_full_disk_loses_nothing(experiment, tmp_path, kind, size) -> None:
    changes = {} if METHODS[kind] is None else {"method": METHODS[kind]}
    made = experiment(**changes)
    assert made.job.items  # opened before the disk is full
    text = "run(/artifacts)?: a file would exceed the size limit; what was finished is kept. Make"
    with no_file_above(size), pytest.raises(InvalidInput, match=text):
        made.run(tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.part"))
    kept = list((tmp_path / "run").rglob("batch-*.parquet"))
    for file in kept:
        parquet.read_table(file)
    assert len(experiment(**changes).run(tmp_path / "run").rows) == (6 if kind == "edit" else 16)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_really_is_full(experiment, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(36 * 1024))
    text = "run: the disk is full; what was finished is kept. Make room and run the same command"
    with pytest.raises(InvalidInput, match=text):
        experiment(save={"images": False}).run(small_disk / "run")
    ballast.unlink()


@pytest.mark.parametrize(
    "place, text",
    [
        ("/proc/run", "/proc/run cannot be written: "),
        ("/proc/self/fd/run", "/proc/self/fd/run cannot be written: "),
        ("{tmp_path}/file", "file cannot be written: File exists"),
        ("{tmp_path}/file/run", "file/run cannot be written: Not a directory"),
        ("{tmp_path}/" + "x" * 300, "cannot be written: File name too long"),
    ],
)
def test_a_folder_that_cannot_be_written(experiment, tmp_path, place, text) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match=text):
        experiment().run(place.format(tmp_path=tmp_path))
    assert (tmp_path / "file").read_text() == ""


def test_a_folder_of_another_format(experiment, tmp_path: Path) -> None:
    out = tmp_path / "run"
    experiment().run(out)
    plan = read_json(out / "plan.json")
    write_json(out / "plan.json", {**plan, "format": FORMAT + 1})
    text = f"run was written in format {FORMAT + 1}, this version writes {FORMAT}: give another"
    with pytest.raises(InvalidInput, match=text):
        experiment().run(out)
    write_json(out / "plan.json", {**plan, "units": [[0, 6]]})
    with pytest.raises(InvalidInput, match="run/plan.json does not fit its spec"):
        experiment().run(out)


def test_rows_without_a_fingerprint_are_not_gone_on_from(experiment, tmp_path: Path) -> None:
    out = tmp_path / "run"
    experiment().run(out)
    (out / "fingerprint.json").unlink()
    with pytest.raises(
        InvalidInput, match="run has files, but no fingerprint.json that says of what"
    ):
        experiment(seeds={"count": 2}).run(out)


def test_a_plan_without_a_fingerprint_is_made_anew(experiment, tmp_path: Path) -> None:
    """As a run leaves it that is killed before its first batch."""
    out = tmp_path / "run"
    out.mkdir()
    write_json(out / "plan.json", {"format": FORMAT, "batch": 2, "units": [[0, 2]]})
    assert len(experiment().run(out).rows) == 6


def test_a_damaged_table_of_a_finished_run(experiment, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rows = experiment().run(out).rows
    file = out / "rows.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match="rows.parquet is damaged"):
        experiment().run(out)
    file.unlink()
    assert experiment().run(out).rows == rows
    assert load_results(out).rows == rows


def test_rows_of_a_batch_can_have_different_columns(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    folder.write_unit(UNITS[0], [{"row": 0}, {"row": 1, "axis": 2}], [], [])
    assert folder.read_unit(UNITS[0]).to_pylist() == [
        {"row": 0, "axis": None},
        {"row": 1, "axis": 2},
    ]


def test_columns_of_different_kinds_are_refused(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    text = "metrics: a column holds different kinds of values: "
    with pytest.raises(InvalidInput, match=text):
        folder.write_unit(UNITS[0], [{"row": 0, "x": 1}, {"row": 1, "x": "a"}], ["x"], [])
    units = [RowBatch(0, 0, 1), RowBatch(1, 1, 2)]
    for unit, value in zip(units, (True, "a"), strict=True):
        folder.write_unit(unit, [{"row": unit.start, "x": value}], ["x"], [])
    with pytest.raises(InvalidInput, match=text):
        folder.merge(units)


def test_columns_that_were_empty_in_the_first_batch_keep_their_values(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    given = [{"row": 0, "x": None}, {"row": 1, "x": 1}, {"row": 2, "x": 0.5}]
    units = [RowBatch(n, n, n + 1) for n in range(3)]
    for unit, row in zip(units, given, strict=True):
        folder.write_unit(unit, [row], ["x"], [])
    folder.merge(units)
    assert [row["x"] for row in folder.table()[0]] == [None, 1, 0.5]
    assert isinstance(parquet.read_table(folder.rows_file), pa.Table)
