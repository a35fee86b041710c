"""The commands that all kinds of jobs share, on one small job of each kind."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from training.jobs import DOWN, MATRIX, PROBES, REFT
from typer.testing import CliRunner

from dreamreader.cli import app
from dreamreader.harvest.spec import Spec as HarvestSpec
from dreamreader.training import ProbeSpec, ReftSpec

SPECS = {
    "experiment": {
        "name": "half",
        "subject": "shapes-unet",
        "data": {"prompts": ["a red circle"]},
        "pipeline": {"num_inference_steps": 1},
        "method": {
            "kind": "edit",
            "edits": [{"kind": "scale", "site": "unet.mid_block", "factor": 0.5}],
        },
        "metrics": ["pixel_distance"],
    },
    "harvest": {
        "name": "the middle",
        "subject": "shapes-unet",
        "data": {"prompts": ["a red circle", "a blue square"]},
        "pipeline": {"num_inference_steps": 1},
        "capture": [{"sites": "unet.mid_block"}],
        "store": {"unit": 1},
    },
    "reft": REFT,
    "probes": {**PROBES, "sites": DOWN},
    "map-matrix": {**MATRIX, "sites": "unet.mid_block"},
}
KINDS = list(SPECS)


def run(*arguments: str | Path):
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a spec of each kind, and in runs/ what it leaves."""
    folder = tmp_path_factory.mktemp("jobs")
    for kind, content in SPECS.items():
        spec = folder / f"{kind}.yaml"
        spec.write_text(yaml.safe_dump(content))
        found = run("run", spec, "-o", folder / "runs" / kind)
        assert found.exit_code == 0, found.output
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_goes_on_with_its_own_spec_and_is_left_as_it_is(place: Path, kind: str):
    folder = place / "runs" / kind
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.name != ".lock"}
    found = run("run", folder)
    assert found.exit_code == 0, found.output
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert (folder / "report.html").is_file()
    found = run("run", folder, "seeds=[1]")
    assert found.exit_code == 2 and "which has its own spec; to change" in found.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_plan_is_a_dry_run(place: Path, kind: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plans = [run("plan", place / f"{kind}.yaml"), run("run", place / f"{kind}.yaml", "--dry-run")]
    for found in plans:
        assert found.exit_code == 0, found.output
        name = "edit" if kind == "experiment" else kind
        assert found.stdout.startswith(f"{SPECS[kind]['name']}: {name}\n")
    shapes = [re.sub(r"[\d.]+ (ms|s|min)", "", found.stdout).split("time")[0] for found in plans]
    assert shapes[0] == shapes[1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_show_report_verify_and_diff(place: Path, kind: str, tmp_path: Path):
    folder = place / "runs" / kind
    shown = run("show", folder)
    assert shown.exit_code == 0 and shown.stdout.startswith(f"{kind}, complete, fingerprint ")
    assert SPECS[kind]["name"] in shown.stdout.splitlines()[1]
    spec = yaml.safe_load(run("show", place / f"{kind}.yaml").stdout)
    assert spec["kind"] == kind and spec["name"] == SPECS[kind]["name"]
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert run("report", folder).exit_code == 0
    assert (folder / "report.html").read_text() == page
    assert run("verify", folder).exit_code == 0
    same = run("diff", folder, folder)
    assert same.exit_code == 0 and same.stdout.startswith(("no difference", "rows: 2 and 2"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("harvest", "shards/000000/unit.json"), ("reft", "history.jsonl"), ("probes", "result.json")],
)
def test_verify_and_diff_see_what_was_changed(place: Path, kind: str, name: str, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(place / "runs" / kind, copy)
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data.replace(b"1", b"2"))
    found = run("verify", copy)
    assert found.exit_code == 1, found.output
    assert name.rpartition("/")[2] in found.output


def test_other_results_and_other_kinds_are_told(place: Path, tmp_path: Path):
    found = run("run", place / "reft.yaml", "training.steps=4", "-o", tmp_path / "short")
    assert found.exit_code == 0, found.output
    found = run("diff", place / "runs" / "reft", tmp_path / "short")
    assert found.exit_code == 1
    assert "training.steps" in found.stdout and "results" in found.stdout
    found = run("diff", place / "runs" / "reft", place / "runs" / "probes")
    assert found.exit_code == 2 and "is of the kind reft, " in found.stderr


def test_a_merged_store_is_shown_and_verified(place: Path, tmp_path: Path):
    other = tmp_path / "other"
    assert run("run", place / "harvest.yaml", "seeds=[7]", "-o", other).exit_code == 0
    both, first = tmp_path / "both", place / "runs" / "harvest"
    assert run("store", "merge", first, other, "-o", both).exit_code == 0
    shown = run("show", both)
    assert shown.exit_code == 0, shown.output
    assert " + " in shown.stdout and "in 4 of 4 units" in shown.stdout
    assert run("verify", both).exit_code == 0
    found = run("run", both)
    assert found.exit_code == 2 and "holds 2 harvests, so none of them goes on" in found.stderr


def test_runs_lists_name_kind_fingerprint_and_state(place: Path, tmp_path: Path):
    shutil.copytree(place / "runs", tmp_path / "runs")
    part = tmp_path / "runs" / "harvest"
    manifest = json.loads((part / "manifest.json").read_text())
    shutil.rmtree(part)
    found = run("run", place / "harvest.yaml", "--limit-gb", "0.000000001", "-o", part)
    assert found.exit_code == 0 and "not complete; the same command" in found.stdout
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "probes" / "fingerprint.json").write_text("{}")
    found = run("runs", tmp_path / "runs")
    assert found.exit_code == 0, found.output
    lines = {line.split()[0]: line.rstrip().split(maxsplit=3) for line in found.stdout.splitlines()}
    assert lines.keys() == {"name", *KINDS}
    assert lines["experiment"][1] == "experiment" and lines["experiment"][3] == "complete"
    assert lines["harvest"][2] == manifest["jobs"][0]["run"][:12]
    assert lines["harvest"][3] == "stopped, 0 of 2 units"
    assert lines["reft"][3] == "complete" and "damaged" in " ".join(lines["probes"])
    assert run("runs", tmp_path).exit_code == 2
    assert "none: no such folder" in run("runs", tmp_path / "none").stderr


@pytest.mark.parametrize(
    ("kind", "model"), [("harvest", HarvestSpec), ("reft", ReftSpec), ("probes", ProbeSpec)]
)
def test_the_schema_of_a_kind_or_of_a_spec(place: Path, kind: str, model):
    for found in (run("schema", kind), run("schema", place / f"{kind}.yaml")):
        assert found.exit_code == 0 and json.loads(found.stdout) == model.model_json_schema()


def test_files_of_trainings_are_shown(place: Path):
    adapter = run("show", place / "runs" / "reft" / "adapter.safetensors")
    assert adapter.exit_code == 0 and "trainable params: " in adapter.stdout
    probe = run("show", place / "runs" / "probes" / "probes" / f"{DOWN}.safetensors")
    assert probe.exit_code == 0 and "accuracy (95 %)" in probe.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "empty.yaml"], "empty.yaml: no kind of job is known by it. It has name, capure; "),
        (["run", "kind.yaml"], "unknown kind.yaml: kind of job 'harvst'; nearest: harvest"),
        (["run", "wrong.yaml"], "kind: input should be 'harvest', got 'probes'"),
        (["show", "."], ". is no run folder: it has neither fingerprint.json nor manifest.json"),
        (["verify", "none"], "error: none: no such run folder"),
        (["schema", "harvst"], "unknown kind of job 'harvst'; nearest: harvest"),
        (["run", "{place}/reft.yaml", "--limit-gb", "1"], "--limit-gb is of a harvest; this is of"),
        (["run", "{place}/reft.yaml", "--workers", "2"], "--workers and --address are of --engine"),
        (
            ["run", "{place}/reft.yaml", "seeds=4"],
            "seeds: 4 could be one seed or a number of",
        ),
    ],
)
def test_errors_say_what_was_looked_at(place, arguments, text, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.yaml").write_text("name: x\ncapure: []\n")
    Path("kind.yaml").write_text("kind: harvst\n")
    Path("wrong.yaml").write_text(yaml.safe_dump({**SPECS["harvest"], "kind": "harvest"}))
    if arguments == ["run", "wrong.yaml"]:
        arguments = ["harvest", "wrong.yaml"]
        Path("wrong.yaml").write_text(yaml.safe_dump({**SPECS["harvest"], "kind": "probes"}))
    found = run(*(each.format(place=place) for each in arguments))
    assert found.exit_code == 2, found.output
    assert text in found.stderr and "Traceback" not in found.output


@pytest.mark.parametrize(
    "kind, other",
    [
        ("harvest", "experiment"),
        ("reft", "harvest"),
        ("experiment", "harvest"),
        ("reft", "experiment"),
        ("probes", "reft"),
    ],
)
def test_a_folder_of_another_kind_is_refused_and_left_as_it_is(place: Path, kind: str, other: str):
    holds = f"holds a job of the kind {other}, and this one is of the kind {kind}"
    folder = place / "runs" / other
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    found = run("run", place / f"{kind}.yaml", "-o", folder)
    assert found.exit_code == 2 and holds in " ".join(found.output.split())
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
