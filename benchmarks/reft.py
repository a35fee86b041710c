"""LoReFT beside pyreft and beside plain torch: the module alone, and training to the same error.

    python benchmarks/reft.py [--rounds 7] [--threads 2] [--write]

pyreft runs in an environment of its own (peers/), and so that both are timed in one process, ours
runs there too, from this checkout. The plain torch is the folded formula with a thin QR, under
autograd, and with a gradient derived by hand. Training is on made activations with a relation of
low rank, and on those of shapes-unet for captions without and with a frame, on the same latents.
Nothing is printed or written unless all ways give the values and gradients of a float64 run, and
our training reaches the held-out error of pyreft's.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from paired import environment, summary, write
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[1]
PEERS = Path(__file__).parent / "peers"
TOKENS = 4096
CASES = [(4096, 8, "float32"), (4096, 8, "bfloat16"), (1280, 32, "float32")]
GOALS = {
    "4096 float32": {"pyreft": 12.0, "torch": 1.5},
    "1280 float32": {"pyreft": 8.0},
    "training": {"pyreft": 3.0},
}
SITE = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
TRAINING = {
    "made": {"rank": 32, "batch": 1024, "steps": 100, "lr": 3e-3, "every": 2},
    "shapes-unet": {"rank": 8, "batch": 1024, "steps": 200, "lr": 1e-2, "every": 2},
}


def made(width: int = 1280, rank: int = 32, rows: int = 16_384, noise: float = 0.1) -> dict:
    """Activations of falling variance, and a teacher that sets a subspace by a linear map."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    basis = torch.linalg.qr(drawn(width, width))[0]
    base = drawn(rows, width) * torch.arange(1, width + 1).float().rsqrt() @ basis
    base /= base.std()
    rotation = torch.linalg.qr(drawn(width, rank))[0].T
    source, bias = drawn(rank, width) * width**-0.5, drawn(rank)
    teacher = base + (base @ (source - rotation).T + bias) @ rotation
    return parted(base, teacher + noise * drawn(rows, width))


def recorded(pictures: int = 48, steps: int = 10) -> dict[str, Tensor]:
    """What an attention of shapes-unet puts out for captions without and with a frame.

    Both see the latents of the pictures without one, at every second step.
    """
    from dreamreader import zoo
    from dreamreader.zoo.scenes import sample_scene

    pipe: Any = zoo.load_pipeline("shapes-unet")
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(0)
    plain = [
        sample_scene(rng, objects=1).caption().removesuffix(" with a frame")
        for _ in range(pictures)
    ]
    framed = [f"{caption} with a frame" for caption in plain]
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_pipe: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict:
        if step % 2 == 0:
            seen.append((timestep, values["latents"].clone()))
        return values

    generators = [torch.Generator().manual_seed(seed) for seed in range(pictures)]
    settings = zoo.settings(num_inference_steps=steps)
    pipe(plain, generator=generators, callback_on_step_end=keep, **settings)
    outputs: list[Tensor] = []
    hook = pipe.unet.get_submodule(SITE).register_forward_hook(
        lambda module, args, out: outputs.append(out)
    )
    with hook, torch.no_grad():
        for captions in (plain, framed):
            text = pipe.encode_prompt(captions, pipe.device, 1, False)[0]
            for timestep, latents in seen:
                pipe.unet(latents, timestep, text)
    width = outputs[0].shape[-1]
    # [captions, moments, pictures, tokens, width], the pictures first so that some are held out
    values = torch.stack(outputs).unflatten(0, (2, len(seen))).transpose(1, 2)
    return parted(*values.reshape(2, -1, width))


def parted(base: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """The last quarter is held out."""
    cut = len(base) * 3 // 4
    parts = {"base": base[:cut], "teacher": teacher[:cut]}
    parts |= {"held_base": base[cut:], "held_teacher": teacher[cut:]}
    return {name: part.contiguous() for name, part in parts.items()}


def ask(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Has both measured in the environment of pyreft."""
    sys.path.insert(0, str(PEERS))
    from run import interpreter

    data = {name: folder / f"{name}.safetensors" for name in TRAINING}
    for name, make in {"made": made, "shapes-unet": recorded}.items():
        save_file(make(), data[name])
    job = {
        "cases": [
            {"tokens": TOKENS, "width": width, "rank": rank, "dtype": dtype}
            for width, rank, dtype in CASES
        ],
        "training": TRAINING,
        "data": {name: str(file) for name, file in data.items()},
        "rounds": options.rounds,
        "threads": options.threads,
    }
    command = [str(interpreter("pyreft", options.cache)), str(PEERS / "peer_pyreft.py")]
    done = subprocess.run(
        command,
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise SystemExit("pyreft failed")
    return json.loads(done.stdout.strip().splitlines()[-1])


def module_row(row: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each way, and how many times as fast ours is."""
    times, left_out = row.pop("times"), row.pop("left_out")
    speedup = {}
    for suffix in ("", " forward"):
        own = times[f"dreamreader{suffix}"]
        plain = [times[f"{name}{suffix}"] for name in ("autograd", "derived")]
        fastest = min(plain, key=lambda each: summary(each)["median"])
        speedup[f"pyreft{suffix}"] = summary(times[f"pyreft{suffix}"], own)
        speedup[f"torch{suffix}"] = summary(fastest, own)
    return row | {
        "milliseconds": {name: scaled(each, 1e3) for name, each in times.items()},
        "speedup": speedup,
        "goal": GOALS.get(f"{row['width']} {row['dtype']}", {}),
        "rounds": len(times["pyreft"]),
        "rounds_left_out": left_out,
    }


def training_row(row: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the held-out error of pyreft at its end, and how many times as fast ours is."""
    times, left_out = row.pop("times"), row.pop("left_out")
    return row | {
        "seconds": {name: summary(each) for name, each in times.items()},
        "speedup": {"pyreft": summary(times["pyreft"], times["dreamreader"])},
        "goal": GOALS["training"],
        "rounds": len(times["pyreft"]),
        "rounds_left_out": left_out,
    }


def scaled(times: list[float], factor: float) -> dict[str, float]:
    return summary([factor * each for each in times])


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        report = ask(options, Path(scratch))
    if report["problems"]:
        found = report["problems"]
        print("no times, since these checks failed:", *found, sep="\n  ", file=sys.stderr)
        return 1
    result = {
        "benchmark": "reft",
        "environment": environment(),
        "peers": report["versions"],
        "backend": report["backend"],
        "rows": [module_row(row) for row in report["rows"]],
        "training": [training_row(row) for row in report["training"]],
    }
    show(result)
    if options.write:
        print(write(result, options.output or "reft"))
    return 0


def show(result: dict[str, Any]) -> None:
    print(f"low_rank: {result['backend']}")
    for row in result["rows"]:
        print(f"[{row['tokens']}, {row['width']}] rank {row['rank']} {row['dtype']}")
        for name, each in row["milliseconds"].items():
            print(f"  {name:20s} {each['median']:9.2f} ms")
        said(row)
    for row in result["training"]:
        print(f"training, {row['data']}, width {row['width']} rank {row['rank']}")
        for name, each in row["seconds"].items():
            reached = row["reached"][name]
            print(
                f"  {name:20s} {each['median']:9.2f} s, {reached['steps']:.0f} steps to "
                f"{reached['error']:.4f} of the error without an edit"
            )
        said(row)


def said(row: dict[str, Any]) -> None:
    for name, each in row["speedup"].items():
        goal = f"   goal {row['goal'][name]:g}" if name in row["goal"] else ""
        quantiles = f"[{each['q20']:.2f}, {each['q80']:.2f}]"
        print(f"  {each['median']:.2f} {quantiles} times as fast as {name}{goal}")
    if row["rounds_left_out"] == -1:
        print("  too few quiet rounds: other processes ran, so these figures say little")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    default = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dreamreader" / "peers"
    )
    parser.add_argument("--cache", type=Path, default=default, help="environments of the peers")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--output", type=Path, help="file to write instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
