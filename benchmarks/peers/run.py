"""The same recording and steering job through several libraries, each in an environment of its own.

    python benchmarks/peers/run.py [--model shapes-unet] [--untrained] [--peers hooks nnsight]

Environments are made once, under --cache, from the pinned requirements-<peer>.txt beside this file;
dreamreader runs in the environment that runs this script. Prints and writes nothing unless every
peer recorded the same values and made the same pictures.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from paired import environment, write  # noqa: E402
from protocol import Job  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from untrained import save_untrained  # noqa: E402

PROMPTS = [
    f"a {color} {shape}"
    for color in ("red", "blue")
    for shape in ("circle", "star", "cross", "square")
]
EXACT = 1e-5  # of values that no library changes: 0 where all run the same torch
STEERED = 2e-3  # of pictures in [0, 1], after twenty steps that each round a little differently


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "model"
        name = options.model
        folder = save_untrained(name, made) if options.untrained else model_folder(name)
        job = Job(
            model=folder,
            prompts=PROMPTS,
            sites=cross_attentions(folder),
            steps=options.steps,
            guidance=4.0,
            alpha=options.alpha,
            rounds=options.rounds,
            threads=options.threads,
            folder=scratch,
        )
        reports = {name: ask(name, job, options.cache) for name in options.peers}
        problems = differences(
            {name: load_file(each.pop("results")) for name, each in reports.items()}
        )
    if problems:
        print(
            "no times, since the peers did not compute the same:",
            *problems,
            sep="\n  ",
            file=sys.stderr,
        )
        return 1
    weights = "random" if options.untrained else "trained"
    shown = {**asdict(job), "model": Path(options.model).name, "weights": weights}
    del shown["folder"]
    result = {"benchmark": "peers", "environment": environment(), "job": shown, "peers": reports}
    for name, each in reports.items():
        record, steer = each["ratio"]["record"], each["ratio"]["steer"]
        print(
            f"{name:12s} plain {each['seconds']['plain']:.2f} s"
            f"   record x{record['median']:.3f} [{record['q20']:.3f}, {record['q80']:.3f}]"
            f"   steer x{steer['median']:.3f} [{steer['q20']:.3f}, {steer['q80']:.3f}]"
        )
    print(write(result, options.output or f"peers-{Path(options.model).name}"))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes-unet", help="embedded model or pipeline folder")
    parser.add_argument(
        "--untrained", action="store_true", help="random weights; times are the same"
    )
    parser.add_argument("--peers", nargs="+", default=["hooks", "nnsight", "dreamreader"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--alpha", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/peers-<model>-<device>.json"
    )
    default = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dreamreader" / "peers"
    )
    parser.add_argument(
        "--cache", type=Path, default=default, help=f"environments; default {default}"
    )
    return parser.parse_args()


def model_folder(name: str) -> str:
    from dreamreader.zoo.subject import locate

    return locate(name).source


def cross_attentions(folder: str) -> list[str]:
    """Paths below the UNet of all cross-attentions, in the order in which they run."""
    from protocol import load_pipeline

    unet = load_pipeline(folder).unet
    found = [name for name, _ in unet.named_modules() if name.endswith("attn2")]
    order = ("down_blocks", "mid_block", "up_blocks")
    return sorted(found, key=lambda name: order.index(name.split(".")[0]))  # stable within a block


def ask(peer: str, job: Job, cache: Path) -> dict[str, Any]:
    """Runs one peer's process and returns what it reports."""
    command = [str(interpreter(peer, cache)), str(HERE / f"peer_{peer}.py")]
    print(f"{peer}: running", file=sys.stderr, flush=True)
    done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{peer} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def interpreter(peer: str, cache: Path) -> Path:
    """The Python of the peer's environment, which is made where it does not exist yet.

    Packages of requirements-<peer>-alone.txt come without the packages that they ask for.
    """
    requirements = HERE / f"requirements-{peer}.txt"
    if not requirements.exists():
        return Path(sys.executable)
    alone = HERE / f"requirements-{peer}-alone.txt"
    pinned = requirements.read_bytes() + (alone.read_bytes() if alone.exists() else b"")
    key = hashlib.sha256(pinned + sys.version.encode()).hexdigest()[:12]
    folder = cache / f"{peer}-{key}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"{peer}: installing into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "-qq", "-r"]
        subprocess.run([*install, requirements], check=True, stdout=sys.stderr)
        if alone.exists():
            subprocess.run([*install, alone, "--no-deps"], check=True, stdout=sys.stderr)
        (folder / "complete").touch()
    return python


def differences(results: dict[str, dict[str, torch.Tensor]]) -> list[str]:
    """In words, where a peer's results differ from those of the first one."""
    (first, expected), *others = results.items()
    problems = []
    effect = (expected["pictures/steer"] - expected["pictures/plain"]).abs().max()
    if effect < 50 * STEERED:
        problems.append(f"steering changed no pixel by more than {effect:.1e}: nothing to compare")
    for name, got in others:
        if got.keys() != expected.keys():
            problems.append(f"{name}: has {sorted(got)}, {first} has {sorted(expected)}")
            continue
        for key, want in expected.items():
            limit = STEERED if key == "pictures/steer" else EXACT
            if got[key].shape != want.shape:
                problems.append(f"{name} {key}: shape {[*got[key].shape]}, {first} {[*want.shape]}")
            elif not (error := float((got[key] - want).abs().max())) <= limit:
                problems.append(f"{name} {key}: differs from {first} by up to {error:.1e}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
