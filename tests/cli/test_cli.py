"""The real commands, in this process (CliRunner) and, where signals matter, in another."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dreamreader.cli import app

COMMANDS = ["demo", "sites", "generate", "doctor", "bench", "zoo"]


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_help_has_every_command_and_examples():
    found = run("--help")
    assert found.exit_code == 0
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", found.output, re.M)
        if command != "zoo":
            text = run(command, "--help").output
            assert "Example" in text and f"dreamreader {command}" in text
    for command in ("list", "train", "eval", "fetch"):
        assert f"dreamreader zoo {command}" in run("zoo", command, "--help").output


@pytest.mark.parametrize(
    ("said", "want"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "a count", "a policy"],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(
    said: dict[str, str], want: str | None
):
    code = (
        "import os, sys; sys.argv = ['dreamreader', '--version']\n"
        "from dreamreader.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    )
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    rest = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=rest | said, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == f"False {want}"


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from dreamreader.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "found = CliRunner().invoke(app, ['--version'])\n"
        "assert found.exit_code == 0 and found.output.startswith('dreamreader '), found.output\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["demp"], "No such command 'demp'. Did you mean 'demo'?"),
        (["zoo", "lst"], "No such command 'lst'. Did you mean 'list'?"),
        (["generate", "x", "--sed", "1"], "--seed"),
        (["generate", "x", "--steps", "0"], "--steps"),
        (["generate"], "prompts"),
        (["sites", "shapes-unnet"], "unknown model 'shapes-unnet'; nearest: shapes-unet"),
        (["generate", "x", "-m", "shapes-dti"], "unknown model 'shapes-dti'; nearest: shapes-dit"),
        (["zoo", "fetch", "smollm"], "unknown language model 'smollm'; nearest: smollm2-135m"),
        (["zoo", "train", "shapes-unit"], "nearest: shapes-unet"),
        (["demo", "--from", "rde"], "unknown colour 'rde'; nearest: red"),
        (["demo", "--to", "red"], "source and target colour are both red"),
        (["generate", " "], "a prompt is empty"),
    ],
)
def test_user_errors_name_the_nearest_and_exit_with_2(arguments, text):
    found = run(*arguments)
    assert found.exit_code == 2
    assert text in found.output and "Traceback" not in found.output


def test_a_folder_that_is_no_model_is_named(tmp_path):
    found = run("sites", str(tmp_path))
    assert found.exit_code == 2 and f"{tmp_path}: no model_index.json" in found.output
    assert "no config.json (a model of transformers)" in found.output
    (tmp_path / "config.json").write_text("{}")
    found = run("sites", str(tmp_path))
    assert found.exit_code == 2 and "not a whole transformers model" in found.output


def test_broken_weights_are_named_without_a_traceback(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    found = run("generate", "x", "-m", str(broken), "-o", str(tmp_path / "out"))
    assert found.exit_code == 2 and "not a whole diffusers pipeline" in found.output
    shutil.rmtree(broken / "unet")
    found = run("sites", str(broken))
    assert found.exit_code == 2 and str(broken) in found.output
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_said_at_once():
    """In another process, as the hub's client reads the address when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "dreamreader", "sites", "some-one/tiny"],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: some-one/tiny: not whole in the local cache")
    assert "the hub (http://127.0.0.1:9) could not be reached: " in line
    assert line.endswith("(no network?)")


def test_a_hub_id_that_cannot_be_reached_is_an_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = run("sites", "nobody/nothing-at-all")
    assert found.exit_code == 2 and "nobody/nothing-at-all" in found.output
    assert "Traceback" not in found.output


def test_a_language_model_that_is_not_fetched_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMREADER_CACHE", str(tmp_path))
    found = run("sites", "smollm2-135m")
    assert found.exit_code == 2
    assert "`dreamreader zoo fetch smollm2-135m` gets it" in found.output


def test_sites_lists_ports_and_shapes(folder):
    found = run("sites", folder, "unet.**.attn2", "--json")
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)
    assert len(rows) == 7
    by_name = {row["site"]: row for row in rows}
    middle = by_name["unet.mid_block.attentions.0.transformer_blocks.0.attn2"]
    assert middle["shape"][::2] == [2, 96] and middle["module"] == "Attention"
    assert {"out", "in", "delta", "q", "k", "v", "heads", "probs"} == set(middle["ports"])


def test_sites_prints_whole_names_where_there_is_no_terminal(folder):
    found = run("sites", folder, "unet.**.attn2:heads", "--no-shapes")
    assert found.exit_code == 0
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2:heads" in found.stdout
    assert "--shapes runs one step" in found.stderr


def test_sites_shapes_of_modules_that_run_twice_and_of_those_that_do_not(folder):
    rows = json.loads(run("sites", folder, "**", "--json").stdout)
    shapes = {row["site"]: row["shape"] for row in rows}
    assert shapes["unet.mid_block.resnets.0.nonlinearity"] is not None
    assert shapes["vae.encoder.conv_in"] is None


@pytest.mark.parametrize(
    "pattern, text",
    [
        ("unet.**.attn2:hads", "unknown port 'hads'; nearest: heads"),
        ("unet.mid_blok", "unknown site 'unet.mid_blok'; nearest: unet.mid_block"),
        ("unet.**.atn2", "unknown site 'unet.**.atn2'; nearest: unet.**.attn2, unet.**.attn1"),
        ("unet.**.atn2:q", "unknown site 'unet.**.atn2:q'; nearest: unet.**.attn2:q"),
    ],
)
def test_unknown_sites_and_ports_name_the_nearest(folder, pattern, text):
    found = run("sites", folder, pattern)
    assert found.exit_code == 2 and text in found.output


def test_generate_writes_the_same_pictures_alone_and_in_a_batch(folder, tmp_path):
    common = ["-m", folder, "--steps", "2"]
    found = run("generate", "a red circle", "Ä/../b", "-n", "2", "-o", str(tmp_path / "a"), *common)
    assert found.exit_code == 0, found.output
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    starts = ["a-red-circle-seed0", "a-red-circle-seed1", "b-seed2", "b-seed3"]
    assert names == [f"{start}-untrained-steps2.png" for start in starts]
    run("generate", "a red circle", "--seed", "1", "-o", str(tmp_path / "b"), *common)
    one, other = (Image.open(tmp_path / d / names[1]) for d in "ab")
    assert one.size == (64, 64)
    # equal up to one level of 255: batched and single matrix products round differently
    levels = [abs(x - y) for x, y in zip(one.tobytes(), other.tobytes(), strict=True)]
    assert max(levels) <= 1


def test_generate_applies_saved_edits_and_refuses_missing_ones(folder, tmp_path):
    import torch

    from dreamreader.edits import Ablate, save

    save(tmp_path / "edits.safetensors", [Ablate("unet.mid_block", "zero")])
    common = ["generate", "a red circle", "-m", folder, "--steps", "2"]
    edits = ["--edits", str(tmp_path / "edits.safetensors")]
    assert run(*common, "-o", str(tmp_path / "plain")).exit_code == 0
    assert run(*common, "-o", str(tmp_path / "edited"), *edits).exit_code == 0
    name = "a-red-circle-seed0-untrained-steps2"
    plain, edited = tmp_path / "plain" / f"{name}.png", tmp_path / "edited" / f"{name}-edits.png"
    assert plain.read_bytes() != edited.read_bytes()
    missing = run(*common, "-o", str(tmp_path / "no"), "--edits", str(tmp_path / "none"))
    assert missing.exit_code == 2 and "no such file or folder of edits" in missing.output
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(torch.zeros(4).numpy().tobytes())
    refused = run(*common, "-o", str(tmp_path / "no"), "--edits", str(wrong))
    assert refused.exit_code == 2 and "wrong.safetensors" in refused.output
    assert not (tmp_path / "no").exists()


def test_generate_takes_the_folder_of_edits_in_the_order_of_names(folder, tmp_path):
    from dreamreader.edits import Scale, save

    edits = tmp_path / "edits"
    common = ["generate", "a red circle", "-m", folder, "--steps", "2", "-o", str(tmp_path / "out")]
    edits.mkdir()
    empty = run(*common, "--edits", str(edits))
    assert empty.exit_code == 2 and f"{edits}: no file of edits in this folder" in empty.output
    both = [Scale("unet.mid_block", 0.5), Scale("unet.mid_block", 3.0)]
    save(edits / "b.safetensors", both[1])
    save(edits / "a.safetensors", both[0])
    save(tmp_path / "both.safetensors", both)
    for each in (edits, tmp_path / "both.safetensors"):
        found = run(*common, "--edits", str(each))
        assert found.exit_code == 0, found.output
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    start = "a-red-circle-seed0-untrained-steps2"
    assert set(pictures) == {f"{start}-a-b.png", f"{start}-both.png"}
    assert len(set(pictures.values())) == 1


def test_generate_leaves_another_picture_of_the_same_name_and_says_so(folder, tmp_path):
    common = ["generate", "a red circle", "-m", folder, "--steps", "1", "-o", str(tmp_path)]
    first = run(*common)
    assert first.exit_code == 0 and "stay" not in first.output
    assert run(*common).exit_code == 0  # the same picture: nothing to keep apart
    (name,) = (path.name for path in tmp_path.iterdir())
    (tmp_path / name).write_bytes(b"another")
    again = run(*common)
    other = name.replace(".png", "-2.png")
    assert f"other pictures had these names, and stay: {name} -> {other}" in again.output
    assert (tmp_path / name).read_bytes() == b"another"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, other])


def test_generate_draws_embedded_models_as_they_are_measured(tmp_path, monkeypatch):
    from dreamreader import zoo
    from dreamreader.engine import Reader

    seen = []
    plain = Reader.run
    monkeypatch.setattr(
        Reader, "run", lambda *a, **kw: seen.append(kw) or plain(*a, **kw | {"guidance_scale": 1.0})
    )
    found = run("generate", "a red circle", "--steps", "1", "-o", str(tmp_path))
    assert found.exit_code == 0, found.output
    assert seen[0]["guidance_scale"] == zoo.SETTINGS["guidance_scale"] == 2.0


@pytest.mark.parametrize("place", ["folder", "device", "secret"])
def test_what_cannot_be_opened_is_one_line(folder, tmp_path, place):
    wrong = {"folder": tmp_path, "device": "/dev/null", "secret": tmp_path / "secret"}[place]
    (tmp_path / "secret").write_text("")
    (tmp_path / "secret").chmod(0)
    commands = [["probes", "show", str(wrong)], ["reft", "show", str(wrong)]]
    if place == "device":
        commands.append(["generate", "x", "-m", folder, "--edits", str(wrong)])
    for command in commands:
        found = run(*command)
        assert found.exit_code == 2 and "Traceback" not in found.output, found.output
        assert found.output.startswith("error: ") and str(wrong) in found.output


@pytest.mark.parametrize("command", [["sites"], ["generate", "x", "-m"], ["demo", "-m"]])
def test_device_and_dtype_are_options_and_checked_first(command):
    missing = [] if torch.cuda.is_available() else [("--device", "cuda", "device cuda: ")]
    for option, value, text in [
        *missing,
        ("--device", "gpu", "device 'gpu' is none of torch"),
        ("--dtype", "fp16", "unknown dtype 'fp16'; nearest: float16"),
    ]:
        found = run(*command, "shapes-unet", option, value)
        assert found.exit_code == 2 and f"error: {text}" in found.output


def test_sites_of_a_language_model_in_another_dtype(tmp_path):
    import tiny

    for part in tiny.language_model("gpt2"):
        part.save_pretrained(tmp_path)
    found = run("sites", str(tmp_path), "**.attn:q", "--dtype", "bfloat16", "--json")
    assert found.exit_code == 0, found.output
    assert all(row["site"].endswith(".attn:q") for row in json.loads(found.stdout))


def test_generate_into_a_place_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    found = run("generate", "x", "-m", folder, "--steps", "1", "-o", str(tmp_path / "file"))
    assert found.exit_code == 2 and "file is a file; --out names a folder" in found.output


@pytest.mark.parametrize(
    "command", ["generate", "run", "harvest", "reft", "probes", "train", "demo"]
)
def test_a_place_that_cannot_be_written_is_named_before_any_work(folder, tmp_path, command):
    examples = Path(__file__).parents[2] / "examples"
    start = {
        "generate": ["generate", "x", "-m", folder],
        "run": ["run", str(examples / "steer-colour.yaml")],
        "harvest": ["harvest", str(examples / "harvest" / "attention.yaml")],
        "reft": ["reft", "train", str(examples / "reft" / "frame.yaml")],
        "probes": ["probes", "train", str(examples / "probes" / "colour.yaml")],
        "train": ["zoo", "train", "shapes-unet"],
        "demo": ["demo", "-m", folder],
    }[command]
    (tmp_path / "file").write_text("")
    for out, text in (
        (tmp_path / "file", f"{tmp_path / 'file'} is a file; --out names a folder"),
        (tmp_path / "file" / "sub", f"{tmp_path / 'file'} is a file; --out names a folder"),
        (Path("/proc/none"), "nothing can be written in /proc: "),
    ):
        began = time.process_time()
        found = run(*start, "-o", str(out))
        assert found.exit_code == 2 and f"error: {text}" in found.output, found.output
        assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "options, text",
    [
        (["--steps", "1001"], "error: StableDiffusionPipeline: `num_inference_steps`: 1001 cannot"),
        (["--steps", "1", "--guidance", "inf"], "error: guidance_scale=inf: a finite number"),
        (["--steps", "1", "--guidance", "nan"], "Invalid value for '--guidance'"),
        (["--steps", "-1"], "Invalid value for '--steps'"),
        (["--seed", str(2**63)], "error: a seed is between 0 and 2**63 - 1"),
    ],
)
def test_numbers_that_the_pipeline_refuses_are_one_line(folder, tmp_path, options, text):
    found = run("generate", "x", "-m", folder, "-o", str(tmp_path / "out"), *options)
    assert found.exit_code == 2 and text in found.output, found.output
    assert "Traceback" not in found.output and not isinstance(found.exception, ValueError)
    assert not (tmp_path / "out").exists()


def test_edits_of_another_model_name_the_site(folder, tmp_path):
    from dreamreader.edits import Steer, save

    common = ["generate", "x", "-m", folder, "--steps", "1", "-o", str(tmp_path / "out")]
    for site, text in (
        ("transformer.transformer_blocks.0.attn", "unknown site 'transformer.transformer_blocks."),
        ("unet.mid_block", "the site has 96 features, direction is [7]"),
    ):
        save(tmp_path / "edit.safetensors", Steer(site, torch.ones(7), 1.0))
        found = run(*common, "--edits", str(tmp_path / "edit.safetensors"))
        assert found.exit_code == 2 and text in found.output, found.output


def test_zoo_list_says_what_is_here(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMREADER_CACHE", str(tmp_path))
    found = run("zoo", "list")
    assert found.exit_code == 0
    for name in ("shapes-unet", "shapes-unet-b", "shapes-dit", "smollm2-135m", "gemma3-270m"):
        assert re.search(rf"^{name} ", found.output, re.M)
    assert "no: dreamreader zoo fetch smollm2-135m" in found.output


def test_zoo_eval_prints_shares_with_intervals(folder):
    found = run("zoo", "eval", folder, "-n", "2")
    assert found.exit_code == 0, found.output
    assert re.search(r"^color +\d+ +\d+ +\d+ % \(\d+ to \d+\)", found.stdout, re.M)
    assert "all, one object" in found.stdout


def test_doctor_prints_text_and_json():
    text, data = run("doctor"), run("doctor", "--json")
    assert text.exit_code == 0 and "intervene" in text.output
    assert data.exit_code == 0 and json.loads(data.stdout)


def test_bench_outside_a_checkout_says_where_it_is(tmp_path, monkeypatch):
    from dreamreader.cli import bench

    monkeypatch.setattr(bench, "__file__", str(tmp_path / "dreamreader" / "cli" / "bench.py"))
    found = run("bench")
    assert found.exit_code == 2 and "not part of the installed package" in found.output


def test_demo_command_writes_its_report(folder, tmp_path):
    out = tmp_path / "demo"
    found = run("demo", "--small", "-m", folder, "-o", str(out), "--from", "green", "--to", "blue")
    assert found.exit_code == 0, found.output
    assert "green to blue on 4 held-out rows" in found.stdout
    assert (out / "report.html").is_file() and f"report: {out / 'report.html'}" in found.stdout
    assert [p.name for p in (out / "edits").iterdir()] == ["green-to-blue.safetensors"]


@pytest.mark.parametrize("command, shown", [("demo", "record "), ("generate", "pictures")])
def test_ctrl_c_leaves_nothing_half_written(folder, tmp_path, command, shown):
    """The signal comes when the progress bar shows, in the middle of the work."""
    arguments = [command, "-m", folder, "-o", str(tmp_path / "out")]
    if command == "generate":
        arguments += ["a red circle", "-n", "64"]
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dreamreader", *arguments],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100"},
        # whoever starts these tests in the background ignores the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(terminal)
    text = read_until(screen, shown)
    process.send_signal(signal.SIGINT)
    text += read_until(screen, "stopped; no file was left half-written")
    assert process.wait() == 130
    assert "Traceback" not in text + read_until(screen, None)
    os.close(screen)
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    if command == "generate":
        assert all(p.suffix == ".png" and Image.open(p).load() for p in left)
        return
    assert "the same command goes on" in text
    assert all("record" in p.relative_to(tmp_path).parts for p in left)
    assert all(json.loads(p.read_text()) for p in left if p.suffix == ".json")


def read_until(screen: int, wanted: str | None) -> str:
    """What a terminal shows until a text comes; to the end of the process where None."""
    text = ""
    while wanted is None or wanted not in text:
        try:
            block = os.read(screen, 4096).decode(errors="replace")
        except OSError:  # Linux: the other end is closed
            block = ""
        if not block:
            assert wanted is None, f"{wanted!r} never came: {text}"
            break
        text += block
    return text
