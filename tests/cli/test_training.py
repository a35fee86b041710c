"""The real commands `dreamreader reft` and `dreamreader probes`."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dreamreader.cli import app
from dreamreader.reft import Reft
from dreamreader.training import ProbeJob, ReftJob

EXAMPLES = Path(__file__).parents[2] / "examples"
SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
SMALL_REFT = (
    *("data.scenes.count=4", "pipeline.num_inference_steps=2", f"sites={SITE}", "training.steps=6"),
    *("training.validation=0.25", "training.validate_every=3", "batch.rows=4"),
)
SMALL_PROBES = (
    *("data.scenes.count=60", "pipeline.num_inference_steps=1", f"sites={SITE}"),
    *("probe.epochs=3", "probe.controls=false", "batch.rows=30"),
)


def run(*arguments: str | Path):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize("path", sorted((EXAMPLES / "reft").glob("*.yaml")), ids=lambda p: p.stem)
def test_examples_of_adapters_train(path: Path, tmp_path: Path):
    out = tmp_path / "out"
    found = run("reft", "train", path, *SMALL_REFT, "-o", out)
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    spec = ReftJob.from_file(path).spec
    assert lines[0].startswith(f"{spec.name}: ") and "at 1 sites, best at step" in lines[0]
    assert "% of the difference explained on 1 held-out prompts, 3 trained" in lines[1]
    assert lines[2] == f"report: {out / 'report.html'}"
    assert "training" in found.stderr and "loss 0." in found.stderr
    assert Reft.load(out / "adapter.safetensors").sites == (SITE,)
    shown = run("reft", "show", out).stdout
    assert SITE in shown and "trainable params: " in shown and "loreft, the same at all" in shown


@pytest.mark.parametrize("path", sorted((EXAMPLES / "probes").glob("*.yaml")), ids=lambda p: p.stem)
def test_examples_of_probes_train(path: Path, tmp_path: Path):
    out = tmp_path / "out"
    found = run("probes", "train", path, *SMALL_PROBES, "-o", out)
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0] == f"{ProbeJob.from_file(path).spec.name}: 1 probes"
    assert lines[1].startswith(f"  {SITE}: accuracy ")
    assert lines[2] == f"report: {out / 'report.html'}"
    shown = run("probes", "show", out / "probes" / f"{SITE}.safetensors").stdout
    assert "subject  shapes-unet" in shown and "accuracy (95 %)" in shown


@pytest.mark.parametrize(
    ("command", "example", "small", "text"),
    [
        ("reft", "reft/frame.yaml", SMALL_REFT, "calls       8 to train on and to hold out"),
        ("probes", "probes/colour.yaml", SMALL_PROBES, "rows    60: 60 prompts, 1 seeds"),
    ],
    ids=["reft", "probes"],
)
def test_a_dry_run_writes_nothing(command, example, small, text, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(command, "train", EXAMPLES / example, *small, "--dry-run")
    assert found.exit_code == 0, found.output
    assert text in found.stdout.splitlines() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("reft", "train", "reft/frame.yaml", "training.rnk=3", "-o", "x"),
            "override 'training.rnk=3': training.rnk: unknown field; nearest: rank",
        ),
        (
            ("probes", "train", "probes/colour.yaml", "labels=colr", "-o", "x"),
            "error: unknown column of labels 'colr'; nearest: ",
        ),
        (("reft", "show", "reft/frame.yaml"), "frame.yaml is no safetensors file"),
        (("probes", "show", "probes/colour.yaml"), "colour.yaml is no safetensors file"),
        (("reft", "show", "frame"), "error: frame: no such file"),
        (("probes", "show", "colour"), "error: colour: no such file; probes are in"),
    ],
    ids=[
        "field",
        "column",
        "reft file",
        "probes file",
        "no reft",
        "no probes",
    ],
)
def test_what_is_said_about_mistakes(tmp_path: Path, monkeypatch, arguments, text: str):
    monkeypatch.chdir(tmp_path)
    named = [EXAMPLES / each if each[:5] in ("reft/", "probe") and "/" in each else each
             for each in arguments]  # fmt: skip
    found = run(*named)
    assert found.exit_code == 2 and text in found.stderr, found.output
    assert not list(tmp_path.iterdir())
