"""One small thing of every kind that can be saved."""

import json
from collections import Counter
from typing import Any

import numpy as np
import torch
from PIL import Image

from dreamreader.artifacts import Artifact
from dreamreader.attention import WordMaps
from dreamreader.edits import Ablate, Box, Edits, Mlp, Patch, ProbeGuidance, Scale, Steer
from dreamreader.engine import Activation, Cache, Firing, FiringReport, Row
from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.fitting.checkpoint import TrainingState
from dreamreader.mapping import AffineMap, LocalMap, StepMaps
from dreamreader.probes import Probe, fit
from dreamreader.reft import Reft
from dreamreader.steering import Directions, Evidence
from dreamreader.sweep import Cell, Grid

NAN = float("nan")


def cache() -> Cache:
    """bfloat16, steps that are unknown, tokens by number, padding, two branches, an empty one."""
    rows = (Row(0, "a cat – ü", 3), Row(1))
    steps = (StepInfo(-1, NAN, None, NAN, 0), StepInfo(3, 801.0, 0.1, 1 / 3, 1))
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2, 2, 2, 3, 4, generator=generator)
    both = draw.bfloat16()
    both[0, 0, 0, 0] = torch.tensor([NAN, -0.0, float("inf"), 1e-40])
    positions = torch.tensor([[[-1, 0, 1]] * 2, [[0, 1, 2]] * 2])
    kept = draw[:, 0].half()
    return Cache(
        [
            Activation("unet.a", both, rows, ("cond", "uncond"), steps, (1, 3)),
            Activation("lm.h.0", kept, rows, ("cond",), steps, None, None, (0, 5, 7), positions),
            Activation("unet.b:q", draw[:, :1], rows, ("cond",), steps[:1], None, 3),
            Activation("unet.c", torch.zeros(0, 1, 3, 4), (), ("cond",), steps[1:]),
        ]
    )


def edits() -> Edits:
    mlp = Mlp([torch.eye(4)[:2]], [torch.zeros(2)], labels=("red", "blue"))
    return Edits(
        [
            Steer("unet.a", torch.ones(4), [0.0, float("-1.5")], steps=slice(1, 5)),
            Ablate("unet.a", "noise", sigma=0.5, seed=7, sigmas=(0.5, 1.5)),
            Scale("unet.a", -2.0, tokens=Box(0, 0, 0.5, 1), fraction=slice(0.5, None)),
            Patch("unet.b:q", Cache([cache()["unet.b:q"]]), from_rows=[1, 0]),
            ProbeGuidance("unet.a", mlp, "red", alpha=[0.5, 1.0]),
        ]
    )


def probe() -> Probe:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    return fit(x, ["red", "blue"] * 20, epochs=1, hidden=(3,), controls=False)


def grid() -> Grid:
    cells = (
        Cell("a", ("unet.conv_in", "unet.conv_out"), (0, 3), ("cond", "uncond"), (1, -1), (0,)),
        Cell("b", "unet.conv_in", tokens=Box(0.0, 0.25, 0.5, 1.0), note="cut"),
        Cell("c", (), coordinates={"layers": (3, 5), "share": 0.1}),
    )
    values = np.random.default_rng(0).normal(size=(3, 2))
    values[1, 1] = NAN
    return Grid(cells, (Row(0, "a", 1), Row(1)), values, values[0], None, "restore", 0.9)


def word_maps() -> WordMaps:
    firing = Firing("WordMap", "record", "unet.a", 1, 2, Counter({0: 2}), Counter({"cond": 2}), {0})
    return WordMaps(
        torch.tensor([[[[0.5, NAN], [0.0, 1.0]]]]),
        ("rows", "words", "height", "width"),
        (Row(0, "a red cat", 4),),
        (("red",),),
        ("unet.a",),
        (("unet.a", 0),),
        (0, 2),
        [Image.new("RGB", (4, 2), "red")],
        FiringReport([firing], ["seen once"]),
    )


def directions() -> Directions:
    evidence = Evidence((0,), (3, 3), (1, 1), (2.0,), (0.5,), (NAN,), (0.5,), (0.5,))
    vectors = {"unet.a": torch.ones(2, 4), "unet.b": torch.arange(4).bfloat16()}
    return Directions(vectors, "red", "blue", "mean", "none", {"unet.a": evidence})


def reft() -> Reft:
    return Reft({"unet.a": 6, "unet.b": 4}, 2, "direft", steps=2, tokens=[0, -1], init="pyreft")


def steps_of_maps() -> StepMaps:
    """Two maps of unlike forms, with scores that are no numbers."""
    one = AffineMap(torch.zeros(2), torch.ones(3, 2).bfloat16(), torch.zeros(3))
    other = LocalMap(torch.ones(2), torch.ones(3, 2, 1, 1), torch.zeros(3), (1, 4))
    made = StepMaps(torch.zeros(2), [one, other], [0, 3], [float("inf"), 0.5])
    card = {"method": "steps", "target_site": "unet.a", "settings": {"each": "local"}}
    return made.with_card(**card, scores={"fvu": NAN})


def state() -> TrainingState:
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "lr": 1e-3, "betas": (0.9, 0.99)}
    return TrainingState(of={"seed": 1}, done=3, best=float("-inf"), modules=[optimizer, None])


THINGS = {
    "cache": cache,
    "directions": directions,
    "edits": edits,
    "grid": grid,
    "map": steps_of_maps,
    "probe": probe,
    "reft": reft,
    "training": state,
    "word_maps": word_maps,
}


def written(thing: Artifact) -> tuple[Any, ...]:
    """All that a thing tells, to the bit."""
    tensors, content = thing.to_file()
    return (
        type(thing).__name__,
        {
            name: (
                each.dtype,
                each.shape,
                each.detach().contiguous().view(-1).view(torch.uint8).tolist(),
            )
            for name, each in tensors.items()
        },
        json.dumps(content),
    )
