"""What the embedded models learn from: caption attributes, velocities of a diffusion or a flow."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dreamreader.zoo import data, scenes

_UNSAID = "-"
_SLOTS = {
    "shape": scenes.SHAPES,
    "color": (_UNSAID, *scenes.COLORS),
    "size": (_UNSAID, *scenes.SIZES),
    "row": (_UNSAID, *scenes.ROWS),
    "column": (_UNSAID, *scenes.COLUMNS),
}
_WHOLE = {"background": (_UNSAID, *scenes.BACKGROUNDS), "frame": (False, True)}
LAYOUT_BIAS = 0.6  # below 1 draws more of the high noise levels, where places are learned slowly
_ABSENT = -100  # cross_entropy leaves these rows out
T5_TOKENS = 256  # StableDiffusion3Pipeline puts so many zero rows where it has no T5 encoder


def heads(encoders: Any) -> nn.ModuleDict:
    """Linear classifiers of caption attributes, one set per text encoder, for training only."""
    sizes = {f"{slot}{i}": len(options) for i in range(2) for slot, options in _SLOTS.items()}
    sizes |= {name: len(options) for name, options in _WHOLE.items()}
    width = {key: encoder.config.hidden_size for key, encoder in encoders.items()}
    return nn.ModuleDict(
        {
            key: nn.ModuleDict({n: nn.Linear(width[key], s) for n, s in sizes.items()})
            for key in encoders
        }
    )


def caption_loss(stage: Any, tokenizer: Any, batch: int, seed: int) -> Callable[[int], Tensor]:
    """Cross-entropy of reading every attribute of the caption from the state of its end token.

    A text encoder that starts from this knows its words before the denoiser listens to it.
    """

    def loss(step: int) -> Tensor:
        rng = random.Random(f"captions {seed} {step}")
        drawn = [data.training_scene(rng) for _ in range(batch)]
        tokens = data.tokenize(tokenizer, [scene.caption() for scene in drawn])
        labels = {
            name: torch.tensor([_label(s, name) for s in drawn])
            for name in next(iter(stage["heads"].values()))
        }
        total = torch.zeros(())
        for key, encoder in stage["encoders"].items():
            end = tokens.eq(tokenizer.eos_token_id).int().argmax(1)
            states = encoder(tokens, output_hidden_states=True).hidden_states
            for state in states[-2:]:  # pipelines read the last layer or the one before
                at_end = state[torch.arange(batch), end]
                for name, head in stage["heads"][key].items():
                    there = (labels[name] != _ABSENT).sum().clamp(min=1)
                    wrong = F.cross_entropy(
                        head(at_end), labels[name], ignore_index=_ABSENT, reduction="sum"
                    )
                    total = total + wrong / there
        return total / len(labels)

    return loss


def velocity_loss(net: Any, scheduler: Any, latents: Tensor, tokens: Tensor, generator) -> Tensor:
    """v-prediction (Salimans & Ho, arXiv:2202.00512).

    Unlike a loss on the noise it also weighs high noise levels, where the layout is decided.
    """
    noise = torch.randn(latents.shape, generator=generator)
    uniform = torch.rand(len(latents), generator=generator)
    times = (scheduler.config.num_train_timesteps * uniform**LAYOUT_BIAS).long()
    noisy = scheduler.add_noise(latents, noise, times)
    text = net["text_encoder"](tokens).last_hidden_state
    predicted = net["unet"](noisy, times, text).sample
    return F.mse_loss(predicted, scheduler.get_velocity(latents, noise, times))


def flow_loss(net: Any, scheduler: Any, latents: Tensor, tokens: Tensor, generator) -> Tensor:
    """Rectified flow with shifted logit-normal noise levels (Esser et al., arXiv:2403.03206)."""
    noise = torch.randn(latents.shape, generator=generator)
    sigma = torch.sigmoid(torch.randn(len(latents), generator=generator))
    shift = scheduler.config.shift
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    level = sigma.view(-1, 1, 1, 1)
    text, pooled = sd3_text(net, tokens, absent=1)
    with RepeatedLastKey(T5_TOKENS):
        predicted = net["transformer"](
            hidden_states=(1 - level) * latents + level * noise,
            timestep=1000 * sigma,
            encoder_hidden_states=text,
            pooled_projections=pooled,
        ).sample
    return F.mse_loss(predicted, noise - latents)


class RepeatedLastKey(TorchFunctionMode):
    """Attention in which the last key stands for `count` equal ones: log(count) joins its score.

    Zero rows of text are equal in every layer of a joint transformer, which gives text no places;
    one row of this weight is what all of them are, at a fifth of the time.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            score = query.new_zeros(query.shape[-2], key.shape[-2])
            score[:, -1] = math.log(self.count)
            kwargs = {**kwargs, "attn_mask": score}
        return func(*args, **kwargs)


def sd3_text(net: Any, tokens: Tensor, absent: int) -> tuple[Tensor, Tensor]:
    """Text and pooled states as StableDiffusion3Pipeline makes them, `absent` zero rows for T5."""
    outs = [
        net[key](tokens, output_hidden_states=True) for key in ("text_encoder", "text_encoder_2")
    ]
    clip = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
    zeros = torch.zeros(len(tokens), absent, clip.shape[-1])
    return torch.cat([clip, zeros], dim=1), torch.cat([out.text_embeds for out in outs], dim=-1)


def _label(scene: scenes.Scene, name: str) -> int:
    if name == "background":
        return _WHOLE[name].index(scene.background if scene.background_said else _UNSAID)
    if name == "frame":
        return int(scene.frame)
    slot, index = name[:-1], int(name[-1])
    if index >= len(scene.objects):
        return _ABSENT
    obj = scene.objects[index]
    said = slot == "shape" or ("place" if slot in ("row", "column") else slot) in obj.said
    return _SLOTS[slot].index(getattr(obj, slot) if said else _UNSAID)
