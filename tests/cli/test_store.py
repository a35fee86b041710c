"""The real commands of `dreamreader store`."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from store.conftest import fill
from typer.testing import CliRunner

from dreamreader.cli import app
from dreamreader.cli.store import steps_of
from dreamreader.errors import InvalidInput
from dreamreader.store.manifest import Count, Job, Manifest
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.store import Store

COMMANDS = ("info", "verify", "merge", "export", "stats")
OUT = "block.out"


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["store", *map(str, arguments)])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "store"
    fill(ReferenceWriter(folder, "0" * 64))
    Manifest((Job("0" * 64, (0, 3)),)).write(folder)
    return folder


def test_help_of_every_command_has_an_example() -> None:
    for name in COMMANDS:
        found = run(name, "--help")
        assert found.exit_code == 0 and re.search(r"Examples?:\n", found.output)
        assert f"dreamreader store {name}" in found.output
        assert re.search(rf"^  {name} ", run("--help").output, re.M)


def test_info(store) -> None:
    found = run("info", store)
    assert found.exit_code == 0, found.output
    lines = [re.split(r"\s{2,}", line.strip()) for line in found.stdout.splitlines()]
    assert lines == [
        ["site", "width", "dtype", "rows", "GB", "tokens"],
        ["block.attn:heads", "12", "bfloat16", "288", "0.000"],
        ["block.out", "7", "float32", "96", "0.000", "2 x 3"],
        ["rows", "384, 0.000 GB with keys and checksums"],
        ["steps", "0 to 2"],
        ["branches", "cond, uncond"],
        ["units", "2 of 3 sealed, not complete"],
        ["left out", "none"],
        ["not finite", "none"],
        ["run", "0" * 64 + ", units 0 to 2"],
        ["to go on", f"run the same harvest again with --out {store}"],
    ]


def test_info_of_a_merged_store_that_is_not_complete(store, tmp_path) -> None:
    folder = shutil.copytree(store, tmp_path / "store")
    Manifest((Job("0" * 64, (0, 1)), Job("1" * 64, (1, 2)))).write(folder)
    found = run("info", folder).stdout
    assert "to go on    finish each harvest in its own folder, and merge them again" in found
    assert "run the same harvest again" not in found


def test_info_of_a_complete_store(store, tmp_path) -> None:
    folder = shutil.copytree(store, tmp_path / "store")
    Manifest(
        (Job("0" * 64, (0, 2)),), True, (Count("a", 3, 1000), Count("b", 4, 2)), (Count("c", 0, 7),)
    ).write(folder)
    found = run("info", folder).stdout
    assert "2 of 2 sealed, complete" in found and "to go on" not in found
    assert "left out    1,002 rows: 1,000 of a at step 3, 2 of b at step 4" in found
    assert "not finite  7 rows: 7 of c at step 0" in found


def test_verify(store, tmp_path) -> None:
    found = run("verify", store)
    assert found.exit_code == 0
    assert re.match(r"2 units, 384 rows, \S+ GB read: all as it was written\n", found.stdout)
    folder = shutil.copytree(store, tmp_path / "store")
    file = folder / "shards/000001/block.out.safetensors"
    data = bytearray(file.read_bytes())
    data[8192 + 28 * 5] ^= 1
    file.write_bytes(data)
    found = run("verify", folder)
    assert found.exit_code == 1
    lines = found.stdout.splitlines()
    assert lines[0] == ("shards/000001/block.out.safetensors: rows 5 do not have their checksums")
    assert lines[1].endswith("GB read: 1 things are wrong")
    assert lines[2].endswith("run again to make it anew: shards/000001")


def test_merge(store, tmp_path) -> None:
    other = tmp_path / "other"
    fill(ReferenceWriter(other, "1" * 64), units=1)
    found = run("merge", store, other, "--out", tmp_path / "both")
    assert found.exit_code == 0 and found.stdout == f"{tmp_path / 'both'}: 3 units, 576 rows\n"
    file = tmp_path / "both/shards/000002/unit.json"
    assert file.samefile(other / "shards/000000/unit.json")
    run("merge", other, "--copy", "-o", tmp_path / "copy")
    assert (tmp_path / "copy/shards/000000/unit.json").stat().st_nlink == 1


def test_export(store, tmp_path) -> None:
    out = tmp_path / "rows"
    found = run(
        *("export", store, "-o", out, "-f", "npy"),
        *("--site", OUT, "--steps", "-2:", "--branch", "cond", "--branch", "uncond"),
    )
    assert found.exit_code == 0 and found.stdout == f"{out}: 64 rows\n"
    wanted = Store(store).read(OUT, steps=[1, 2]).values
    assert np.array_equal(np.load(out / "block.out.npy"), wanted.numpy())


def test_stats(store, tmp_path) -> None:
    found = run("stats", store, "--site", OUT, "--branch", "cond", "--covariance", "-o", tmp_path)
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    rows = Store(store).read(OUT, branch="cond").values.double()
    scale = 7**0.5 / float(rows.norm(dim=1).mean())
    assert lines[0] == f"block.out: scale to norm sqrt(width) {scale:.6g}"
    assert lines[1].split() == "step branch rows mean norm 5 % median 95 % variance".split()
    assert [line.split()[:3] for line in lines[2:5]] == [[str(n), "cond", "16"] for n in range(3)]
    assert lines[5].split()[:3] == ["all", "48", f"{rows.norm(dim=1).mean():.5g}"]
    content = json.loads((tmp_path / "block.out.json").read_text())
    assert np.allclose(content["whole"]["mean"], rows.mean(0))
    assert np.load(tmp_path / "block.out.covariance.npy").shape == (7, 7)


@pytest.mark.parametrize(
    "text, steps",
    [
        (None, None),
        ("7", [7]),
        ("-1", [-1]),
        ("0,5, 9", [0, 5, 9]),
        (":", slice(None)),
        ("2:", slice(2, None)),
        ("0:-1:2", slice(0, -1, 2)),
    ],
)
def test_steps(text, steps) -> None:
    assert steps_of(text) == steps


@pytest.mark.parametrize("text", ["", "a", "1:b", "1,,2"])
def test_bad_steps(text) -> None:
    with pytest.raises(InvalidInput, match=f"--steps {text}: expected 7, 0,5,9 or start:stop:step"):
        steps_of(text)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["info", "none"], "error: none is no store: it has no manifest.json"),
        (["verify", "none"], "error: none is no store: it has no manifest.json"),
        (["merge", "{store}", "-o", "{store}"], "is there already; name a new folder"),
        (["export", "{store}", "-o", "x", "-f", "nyp"], "unknown format 'nyp'; nearest: npy"),
        (["export", "{store}", "-o", "x", "-f", "npy", "--site", "b"], "unknown site 'b'; nearest"),
        (["stats", "{store}", "--branch", "con"], "unknown branch 'con'; nearest: cond"),
        (["stats", "{store}", "--covariance"], "--covariance is too large to print: name a folder"),
    ],
)
def test_bad_input(arguments, text, store, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(*(each.format(store=store) for each in arguments))
    assert found.exit_code == 2 and text in found.stderr and "Traceback" not in found.output
    assert not (tmp_path / "x").exists()
