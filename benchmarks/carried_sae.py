"""An autoencoder of one model as the beginning of one of another: steps saved to the same FVU.

    python benchmarks/carried_sae.py [--captions 40] [--steps 2000] [--output FILE]

An autoencoder is trained on a site of shapes-unet, carried through ridge maps there and back, and
trained on the same site of shapes-unet-b, beside one that begins with random weights: the same
rows, order, rate and size. FVU is that of rows of held-out captions. A third begins with the
carried one whose decoder rows are brought to length 1, and encoder columns with them.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from paired import environment, write
from torch import Tensor

import dreamreader
from dreamreader.fitting import ByStep
from dreamreader.mapping import AffineMap, PairedRows, fit_map, score_map
from dreamreader.recording import record_between
from dreamreader.sae import SparseAutoencoder, TopK, map_sae, train_sae
from dreamreader.specs.data import scene_items
from dreamreader.specs.parts import Scenes
from dreamreader.zoo import settings

SITE = "unet.up_blocks.2.attentions.1.transformer_blocks.0.attn2"


def main() -> int:
    options = parse()
    train, held = rows_of(options).split(0.2)
    there, back = (fit_map(each, "ridge") for each in (train, train.reversed()))
    assert isinstance(there, AffineMap) and isinstance(back, AffineMap)
    (x, y, _), (x_held, y_held, _) = train.flat(), held.flat()
    source = begin(options, train.d_source)
    learn(options, source, x, x_held)
    carried = map_sae(source, there, back)
    arms = {
        "random": begin(options, train.d_target),
        "carried": carried,
        "carried, rows of length 1": scaled(map_sae(source, there, back)),
    }
    source_fvu = fvu(source, x_held)
    curves, live = {}, {}
    for name, sae in arms.items():
        start, alive = fvu(sae, y_held), share_live(sae, y_held)
        curves[name] = [(0, start), *learn(options, sae, y, y_held)]
        live[name] = [alive, share_live(sae, y_held)]
        print(f"{name}: {start:.3f} at first, {curves[name][-1][1]:.3f} at last", flush=True)
    goal = curves["random"][-1][1]
    result = {
        "benchmark": "carried-sae",
        "environment": environment(),
        "site": SITE,
        "rows": len(x),
        "held_out_rows": len(x_held),
        "latents": options.latents,
        "k": options.k,
        "steps": options.steps,
        "map_fvu": [score_map(there, held).fvu, score_map(back, held.reversed()).fvu],
        "source_fvu": source_fvu,
        "goal_fvu": goal,
        "steps_to": {
            f"{level:.3f}": {name: reached(curve, level) for name, curve in curves.items()}
            for level in (0.2, 0.15, 0.1, goal)
        },
        "live": {"source": [share_live(source, x_held)], **live},
        "curves": curves,
    }
    print(f"steps to FVU: {result['steps_to']}; live latents: {result['live']}")
    print(write(result, options.output or "carried-sae"))
    return 0


def rows_of(options: argparse.Namespace) -> PairedRows:
    """Rows of both models at the same latents."""
    captions = [each.prompt for each in scene_items(Scenes(count=options.captions, seed=3))]
    one, two = dreamreader.load("shapes-unet"), dreamreader.load("shapes-unet-b")
    own: dict[str, Any] = settings(num_inference_steps=12)
    own |= {"seeds": range(300_000, 300_000 + len(captions)), "trajectory": "target"}
    pairs = record_between(one, two, captions, SITE, SITE, progress=False, **own)
    return PairedRows.of(pairs, SITE, SITE)


def begin(options: argparse.Namespace, width: int) -> SparseAutoencoder:
    """With random weights; lengths of decoder rows are free, as those of carried ones are."""
    return SparseAutoencoder(width, options.latents, TopK(options.k), unit_decoder=False, seed=0)


def learn(
    options: argparse.Namespace, sae: SparseAutoencoder, x: Tensor, held: Tensor
) -> list[tuple[int, float]]:
    """Trains in place; FVU on held-out rows after each so many steps."""
    found: list[tuple[int, float]] = []

    def batch(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return x[torch.randint(len(x), (options.batch,), generator=generator)]

    def validate() -> float:
        found.append(((len(found) + 1) * options.every, fvu(sae, held)))
        return found[-1][1]

    recipe = {"lr": options.lr, "warmup": 20, "validate_every": options.every}
    fresh = not bool(sae.b_dec.any())  # or it begins where a training ended
    train_sae(sae, ByStep(batch), steps=options.steps, validate=validate, center=fresh,
              progress=False, **recipe)  # fmt: skip
    return found


@torch.no_grad()
def fvu(sae: SparseAutoencoder, x: Tensor) -> float:
    return float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


@torch.no_grad()
def share_live(sae: SparseAutoencoder, x: Tensor) -> float:
    """Share of latents that are active in some row."""
    return float((sae.encode(x) > 0).any(0).double().mean())


@torch.no_grad()
def scaled(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same with decoder rows of length 1; codes are as large as what they add."""
    length = sae.W_dec.norm(dim=1).clamp(min=1e-12)
    sae.W_dec /= length.unsqueeze(1)
    sae.W_enc *= length
    sae.b_enc *= length
    return sae


def reached(curve: list[tuple[int, float]], goal: float) -> int | None:
    """Steps until the FVU is as small; None where it never is."""
    return next((step for step, value in curve if value <= goal), None)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Autoencoders from carried ones.")
    parser.add_argument("--captions", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=25, help="steps between two measurements")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
