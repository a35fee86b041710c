"""Trains the embedded models from nothing: `dreamreader zoo train <name>`.

The order is autoencoder, captions, denoiser. Batches are a function of seed and step, checkpoints
hold the optimiser: a run that was stopped ends with the same weights as one that was not.
"""

import contextlib
import copy
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dreamreader._progress import Progress, ProgressCallback, ProgressEvent, show_progress
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.fitting import ByStep, Recipe, fit
from dreamreader.zoo import data, models, objectives

EMA = 0.998  # decay of the average of the weights, at most


def recipe(steps: int, batch_size: int, lr: float, warmup: int = 100) -> Recipe:
    """How long and how fast one stage learns; the rate falls to zero over the last quarter."""
    return Recipe(
        steps,
        optimizer={"AdamW": {"betas": (0.9, 0.99), "fused": True}},
        lr=lr,
        weight_decay=0.01,
        batch_size=batch_size,
        warmup=warmup,
        schedule="wsd",
        grad_clip=1.0,
    )


VAE = recipe(2800, 16, 2e-3)
CAPTIONS = recipe(450, 128, 1e-3)
DENOISER = {
    "shapes-unet": recipe(8_000, 64, 1e-3),
    "shapes-unet-b": recipe(4_500, 64, 1e-3),
    "shapes-dit": recipe(6_000, 64, 1e-3),
}
SCENES = 40_000
SAVE_EVERY = 200


def train(name: str, folder: Path, steps: int | None = None, progress: Progress = True) -> Path:
    """Trains one embedded model, or continues a run that was stopped.

    Args:
        name: `shapes-vae` or a name of `models.NAMES`; a denoiser first makes `<folder>/shapes-vae`
            where it is missing.
        folder: where checkpoints and finished models go.
        steps: denoiser (or autoencoder) steps instead of the recipe's.
        progress: shown by default, or a function of a `ProgressEvent` (with the loss), or False.

    Returns:
        `<folder>/<name>/pipeline`, a diffusers folder with float16 weights, or the autoencoder's.

    Raises:
        UnknownName: no embedded model has this name.
    """
    if name not in (*models.NAMES, "shapes-vae"):
        raise UnknownName("embedded model", name, [*models.NAMES, "shapes-vae"])
    if steps is not None and steps < 1:
        raise InvalidInput(f"steps: expected at least 1, got {steps}")
    with show_progress(progress) as report:
        if name == "shapes-vae":
            return train_autoencoder(folder, steps, report)
        if not (folder / "shapes-vae" / "autoencoder" / "config.json").is_file():
            train_autoencoder(folder, None, report)
        return train_denoiser(name, folder, steps, report)


def train_autoencoder(folder: Path, steps: int | None, report: ProgressCallback) -> Path:
    """Mean squared error with a small KL term; then scales the latents to unit variance."""
    recipe = _with_steps(VAE, steps)
    home = folder / "shapes-vae"
    torch.manual_seed(models.SEEDS["shapes-vae"])
    vae = models.build_vae()

    def loss(step: int) -> Tensor:
        rng = random.Random(f"vae {step}")
        target = data.pictures([data.training_scene(rng) for _ in range(recipe.batch_size)], rng)
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=_generator(0, step))
        sample = posterior.mean + posterior.std * noise
        error = vae.decode(sample).sample - target
        return error.square().mean() + 0.2 * error.abs().mean() + 2e-7 * posterior.kl().mean()

    run_stage("autoencoder", recipe, nn.ModuleDict({"vae": vae}), loss, home / "training", report)
    vae.register_to_config(scaling_factor=1 / _latent_deviation(vae))
    out = home / "autoencoder"
    vae.half().save_pretrained(out)
    return out


def train_denoiser(name: str, folder: Path, steps: int | None, report: ProgressCallback) -> Path:
    """Captions first, by a classifier that is thrown away; then denoiser and text encoders."""
    vae = load_autoencoder(folder / "shapes-vae" / "autoencoder")
    home = folder / name
    parts = models.build_parts(name)
    recipe = _with_steps(DENOISER[name], steps)
    seed = models.SEEDS[name]
    encoders = nn.ModuleDict({k: v for k, v in parts.items() if k.startswith("text_encoder")})
    stage = nn.ModuleDict({"encoders": encoders, "heads": objectives.heads(encoders)})
    reader = objectives.caption_loss(stage, parts["tokenizer"], CAPTIONS.batch_size, seed)
    run_stage("captions", CAPTIONS, stage, reader, home / "training-captions", report)
    latents = data.encode_set(vae, parts["tokenizer"], SCENES, seed, report)
    net = nn.ModuleDict({k: v for k, v in parts.items() if isinstance(v, nn.Module)})
    objective = objectives.flow_loss if name == "shapes-dit" else objectives.velocity_loss
    scheduler = models.build_scheduler(name)

    def loss(step: int) -> Tensor:
        generator = _generator(seed, step)
        return objective(net, scheduler, *latents.batch(recipe.batch_size, generator), generator)

    def keep(step: int) -> None:
        if step % (5 * SAVE_EVERY) == 0 or step == recipe.steps:
            save_pipeline(name, parts, vae, home / "pipeline")

    run_stage("denoiser", recipe, net, loss, home / "training-denoiser", report, keep)
    return home / "pipeline"


def run_stage(
    stage: str,
    recipe: Recipe,
    model: nn.ModuleDict,
    loss: Callable[[int], Tensor],
    folder: Path,
    report: ProgressCallback,
    keep: Callable[[int], None] | None = None,
    ema: float = EMA,
) -> None:
    """Optimises `model` in place; leaves the averaged weights in it, also while `keep` runs.

    Args:
        stage: its name, for `report`. loss: of a step. folder: for the checkpoint.
        keep: called with the number of steps done, every so often and in the end.
        ema: decay of the average at most; smaller in the first steps.
    """
    average = Average(model, ema)

    def objective(model: nn.Module, step: int) -> Tensor:
        with BFloat16Products():
            return loss(step)

    def follow(event: ProgressEvent) -> None:
        done = int(event.done)
        report(replace(event, stage=stage))
        if keep is not None and (done % SAVE_EVERY == 0 or done == recipe.steps):
            with average.apply():
                keep(done)

    model.train()
    fit(
        model,
        objective,
        ByStep(lambda step: step),
        recipe,
        folder,
        follow,
        after_step=average.update,
        state={"average": average},
        of={"stage": stage, "ema": ema},
        save_every=SAVE_EVERY,
        check_every=None,
    )
    model.load_state_dict(average.values, strict=False)
    model.eval()


class Average:
    """The exponential moving average of a model's weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, done: int) -> None:
        decay = min(self.decay, done / (done + 9))
        for name, p in model.named_parameters():
            self.values[name].lerp_(p, 1 - decay)

    @contextlib.contextmanager
    def apply(self) -> Iterator[None]:
        """The model with its averaged weights, for as long as the block lasts."""
        live = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.model.load_state_dict(self.values, strict=False)
        try:
            yield
        finally:
            self.model.load_state_dict(live, strict=False)

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, each in self.values.items():
            each.copy_(state[name])


class BFloat16Products(TorchFunctionMode):
    """Linear layers and convolutions in bfloat16, all else in float32.

    A quarter faster than float32 where the CPU multiplies bfloat16; `torch.autocast` is not, since
    it leaves the results in bfloat16, in which norms and activations are slow.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.linear, F.conv2d):
            return func(*args, **(kwargs or {}))
        halved = [a.bfloat16() if isinstance(a, Tensor) else a for a in args]
        named = {k: a.bfloat16() if isinstance(a, Tensor) else a for k, a in (kwargs or {}).items()}
        return func(*halved, **named).float()


def load_autoencoder(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    vae.register_to_config(_name_or_path="shapes-vae")  # not the folder it came from
    return vae.eval().requires_grad_(False)


def save_pipeline(name: str, parts: dict[str, Any], vae: nn.Module, out: Path) -> None:
    """Writes a diffusers folder with float16 weights; the old one stays until the new is whole."""
    pipe = models.assemble(
        name, {k: copy.deepcopy(v) for k, v in parts.items()}, copy.deepcopy(vae)
    )
    fresh = out.with_name(out.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(fresh)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(fresh, out)


def _with_steps(recipe: Recipe, steps: int | None) -> Recipe:
    return recipe if steps is None else replace(recipe, steps=steps)


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@torch.no_grad()
def _latent_deviation(vae: Any) -> float:
    rng = random.Random("moments")
    vae.eval()
    batches = [[data.training_scene(rng) for _ in range(128)] for _ in range(8)]
    latents = torch.cat([vae.encode(data.pictures(b, rng)).latent_dist.mean for b in batches])
    return float(latents.std())
