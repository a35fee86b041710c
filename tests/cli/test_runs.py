"""The real commands about experiments: run, plan, schema, report, diff, verify."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from dreamreader._checked import read_table, write_table
from dreamreader.cli import app
from dreamreader.experiments import Spec, load_results, load_spec

SPEC = """\
name: half the middle
subject: shapes-unet
data:
  prompts: [a red circle, a blue square]
pipeline: {num_inference_steps: 2}
method:
  kind: edit
  edits:
    - {kind: scale, site: unet.mid_block, factor: $factor}
  sweep:
    factor: [1, 0.5]
metrics: [pixel_distance]
batch: {rows: 3}
"""
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments: str | Path):
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture(scope="module")
def finished(spec, tmp_path_factory) -> Path:
    """A complete run of the spec; tests leave it as it is."""
    out = tmp_path_factory.mktemp("runs") / "run"
    found = run("run", spec, "-o", out)
    assert found.exit_code == 0, found.output
    assert "6 rows in 2 batches of 3" in found.stderr
    assert found.stdout.splitlines()[0] == "half the middle: edit on shapes-unet, 6 rows"
    assert re.search(
        r"^  edited +pixel distance|^  edited +pixel_distance \S+ \(", found.stdout, re.M
    )
    assert f"report: {out / 'report.html'}" in found.stdout
    return out


def test_help_of_every_command_has_an_example() -> None:
    for name in ("run", "plan", "show", "schema", "report", "diff", "verify", "runs"):
        found = run(name, "--help")
        assert found.exit_code == 0 and "Example" in found.output
        assert f"dreamreader {name}" in found.output
        assert re.search(rf"^  {name} ", run("--help").output, re.M)


def test_a_finished_run_is_left_as_it_is(spec, finished) -> None:
    before = {f: f.stat().st_mtime_ns for f in finished.rglob("*") if f.name != ".lock"}
    found = run("run", spec, "-o", finished)
    assert found.exit_code == 0 and "6 rows (6 are there) in 2 batches of 3" in found.stderr
    assert before == {f: f.stat().st_mtime_ns for f in before}


def test_a_run_goes_to_runs_by_its_name(spec, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("run", spec, "method.sweep.factor=[0.5]", "data.limit=1", "save.images=false")
    assert found.exit_code == 0, found.output
    assert load_results(tmp_path / "runs" / "half-the-middle").rows[1]["factor"] == 0.5


def test_a_plan_is_printed_and_nothing_written(spec, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("plan", spec, "seeds.count=3")
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0] == "half the middle: edit"
    assert lines[1] == "rows      18: 6 unedited, 12 edited"
    assert lines[2] == "batches   6 of up to 3 rows"
    assert [line.split()[0] for line in lines[3:]] == ["sites", "memory", "time"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["run", "none.yaml"], "error: none.yaml: no such spec file"),
        (["run", "{tmp_path}"], " is no run folder: it has neither fingerprint.json nor manifest"),
        (["schema", "-o", "{tmp_path}"], "error: {tmp_path}: Is a directory"),
        (["plan", "{spec}", "sedes=2"], "error: override 'sedes=2': sedes: unknown field; nearest"),
        (["run", "{spec}", "method.kind=edti"], "method: unknown kind 'edti'; nearest: edit"),
        (["run", "{spec}", "metrics=[tnit]"], "metrics.0: unknown metric 'tnit'; nearest: tint"),
        (["plan", "{spec}", "subject=shapes-unnet"], "unknown model 'shapes-unnet'; nearest: shap"),
        (
            ["plan", "{spec}", "subject.model=none", "--device", "gpu"],
            "error: device 'gpu' is none",
        ),
        (["run", "{spec}", "--dtype", "int8"], "override 'subject.dtype=int8': subject.dtype: "),
        (["run", "{spec}", "data.limit=0"], "override 'data.limit=0': data.limit: "),
        (
            ["run", "{spec}", "seeds.count=10000000"],
            "the sweep has 40,000,000 rows (2 prompts x 10,000,000 seeds x 2 factor)",
        ),
        (
            ["run", "{spec}", "seeds.count=2", "-o", "{finished}"],
            "run holds another run: settings.spec.s",
        ),
        (["run", "{spec}", "-o", "/proc/run"], "error: nothing can be written in /proc: "),
        (["run", "{spec}", "-o", "{spec}"], "spec.yaml is a file; --out names a folder"),
        (["report", "none"], "error: none: no such run folder"),
        (["diff", "{finished}", "none"], "error: none: no such run folder"),
        (["verify", "none"], "error: none: no such run folder"),
        (["verify", "{finished}", "--rows", "0"], "--rows"),
    ],
)
def test_errors_of_users_exit_with_2(
    spec, finished, tmp_path, monkeypatch, arguments, text
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"spec": spec, "finished": finished, "tmp_path": tmp_path}
    found = run(*(each.format(**places) for each in arguments))
    assert found.exit_code == 2, found.output
    assert text.format(**places) in found.output and "Traceback" not in found.output


def test_every_wrong_field_is_told_with_its_line(tmp_path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.replace("data:", "dta:").replace("kind: scale", "kind: scael"))
    found = run("plan", path)
    assert found.exit_code == 2
    for line in (
        f"{path}:3: dta: unknown field; nearest: data",
        f"{path}:9: method.edits.0: unknown kind 'scael'; nearest: scale",
        f"{path}:1: data: field required",
    ):
        assert line in found.output


def test_the_schema_knows_specs(tmp_path) -> None:
    found = run("schema")
    schema = json.loads(found.stdout)
    assert found.exit_code == 0 and schema == Spec.model_json_schema()
    assert schema["additionalProperties"] is False
    assert {"name", "subject", "data", "method"} <= set(schema["required"])
    kinds = set(schema["properties"]["method"]["discriminator"]["mapping"])
    learned = {"reft", "guide", "stitch", "transfer"}
    assert (
        kinds == {"edit", "steer", "patch", "ablate", "windows", "lens", "heatmap", "sae"} | learned
    )
    # what a spec may say in short is right for an editor too
    of = {name: schema["properties"][name]["anyOf"] for name in ("seeds", "subject")}
    assert {each.get("type", "Seeds") for each in of["seeds"]} == {"array", "Seeds"}
    assert "string" in {each.get("type") for each in of["subject"]}
    assert run("schema", "--out", tmp_path / "schema.json").exit_code == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == schema


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_specs(path) -> None:
    spec = load_spec(path)
    assert spec.name and spec.method.kind


def test_examples_are_right_by_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = Spec.model_json_schema()
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    for path in EXAMPLES.glob("*.yaml"):
        validator(schema).validate(yaml.safe_load(path.read_text()))


def test_a_report_is_written_anew(finished) -> None:
    page = finished / "report.html"
    before = page.read_text()
    page.unlink()
    found = run("report", finished)
    assert found.exit_code == 0 and page.read_text() == before
    assert "half the middle: edit on shapes-unet, 6 rows" in found.stdout


def test_diff_of_equal_and_of_other_runs(spec, finished, tmp_path) -> None:
    found = run("diff", finished, finished)
    assert found.exit_code == 0
    assert found.stdout == "rows: 6 and 6; 6 of 6 give the same output to the bit\n"
    assert run("run", spec, "seeds=[4]", "-o", tmp_path / "other").exit_code == 0
    found = run("diff", finished, tmp_path / "other")
    assert found.exit_code == 1
    for text in ("spec", "seeds", "fingerprint", "results", "edited, pixel_distance", "[4]"):
        assert text in found.stdout, text
    assert "rows: 6 and 6; 0 of 6 give the same output to the bit" in found.stdout


def test_verify_holds_and_notices(finished, tmp_path) -> None:
    found = run("verify", finished, "--rows", "4")
    assert found.exit_code == 0, found.output
    assert "4 rows repeated, all equal to the bit" in found.stdout
    rows = read_table(finished / "rows.parquet")
    values = rows.to_pylist()
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("spec.yaml", "plan.json", "fingerprint.json", "firing.json"):
        (copy / name).write_bytes((finished / name).read_bytes())
    (copy / "artifacts").symlink_to(finished / "artifacts")
    values[5]["pixel_distance"] += 0.5
    write_table(copy / "rows.parquet", pa.Table.from_pylist(values, rows.schema))
    found = run("verify", copy, "--rows", "6")
    assert found.exit_code == 1
    line = next(line for line in found.stdout.splitlines() if "pixel_distance" in line)
    assert line.split()[0] == "5" and "1 of 6 repeated rows differ" in found.stdout


@pytest.mark.slow
def test_a_killed_command_goes_on(spec, finished, tmp_path) -> None:
    """The real command in another process, killed when its first batch is there."""
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "dreamreader",
        "run",
        str(spec),
        "-o",
        str(out),
        "batch.rows=1",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ}
    )
    while not list(out.glob("rows/batch-*.parquet")):
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = len(list(out.glob("rows/batch-*.parquet")))
    found = run("run", spec, "-o", out, "batch.rows=1")
    assert found.exit_code == 0, found.output
    note = f" ({there} are there)" if there < 6 else " (6 are there)"
    assert f"6 rows{note} in 6 batches of 1" in found.stderr
    whole = run("run", spec, "-o", tmp_path / "whole", "batch.rows=1")
    assert whole.exit_code == 0
    assert read_table(out / "rows.parquet").equals(read_table(tmp_path / "whole" / "rows.parquet"))
