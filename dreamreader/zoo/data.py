"""Training data of the embedded models: scenes, or their latents with caption tokens."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader._progress import ProgressCallback, silent, track
from dreamreader.zoo import scenes


def training_scene(rng: random.Random) -> scenes.Scene:
    """A scene whose caption and colour-shape pairs are not held out."""
    while (scene := scenes.sample_scene(rng)).held_out():
        pass
    return scene


def held_out_scenes(count: int, seed: int, pairs: bool = False) -> list[scenes.Scene]:
    """Scenes that training never shows: new captions of seen pairs, or (`pairs`) unseen pairs."""
    rng = random.Random(seed)
    found: dict[str, scenes.Scene] = {}
    while len(found) < count:
        scene = scenes.sample_scene(rng)
        if scene.pair_held_out() == pairs and scene.held_out():
            found.setdefault(scene.caption(), scene)
    return list(found.values())


def pictures(batch: list[scenes.Scene], rng: random.Random) -> Float[Tensor, "n 3 64 64"]:
    """Renders scenes, values in [-1, 1]."""
    drawn = np.stack([np.asarray(scenes.render(scene, rng)) for scene in batch])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass
class LatentSet:
    """Latents of rendered scenes with the tokens of their captions."""

    latents: Float[Tensor, "n 4 16 16"]
    tokens: Int[Tensor, "n length"]
    empty: Int[Tensor, " length"]

    def batch(
        self, size: int, generator: torch.Generator, dropout: float = 0.1
    ) -> tuple[Tensor, Tensor]:
        """Float32 latents and tokens; a share `dropout` of the captions is empty."""
        rows = torch.randint(len(self.latents), (size,), generator=generator)
        tokens = self.tokens[rows].clone()
        tokens[torch.rand(size, generator=generator) < dropout] = self.empty
        return self.latents[rows].float(), tokens


@torch.inference_mode()
def encode_set(
    vae: Any, tokenizer: Any, count: int, seed: int, report: ProgressCallback = silent
) -> LatentSet:
    """Renders and encodes `count` training scenes once; training then never runs the encoder."""
    rng = random.Random(seed)
    latents, captions = [], []
    for start in track(range(0, count, 256), "encoding", report):
        batch = [training_scene(rng) for _ in range(min(256, count - start))]
        mean = vae.encode(pictures(batch, rng)).latent_dist.mean
        latents.append((mean * vae.config.scaling_factor).half())
        captions += [scene.caption() for scene in batch]
    return LatentSet(
        torch.cat(latents).clone(), tokenize(tokenizer, captions), tokenize(tokenizer, [""])[0]
    )


def tokenize(tokenizer: Any, captions: list[str]) -> Int[Tensor, "n length"]:
    padded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return padded.input_ids
