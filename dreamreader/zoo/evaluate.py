"""How well an embedded model draws what a caption says, by the detector: `dreamreader zoo eval`."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dreamreader._progress import Progress, pipeline_steps, show_progress, track
from dreamreader.zoo import data, scenes, settings
from dreamreader.zoo.detector import Found, Reading, detect

ATTRIBUTES: tuple[str, ...] = ("color", "shape", "size", "position", "background", "frame")
BATCH = 32


@dataclass(frozen=True)
class Score:
    """Right and asked-for counts; `one`, `two`: captions with every attribute right."""

    right: dict[str, int]
    asked: dict[str, int]

    def share(self, name: str) -> float:
        return self.right[name] / self.asked[name] if self.asked[name] else float("nan")


def evaluate(
    pipe: Any,
    count: int = 512,
    seed: int = 0,
    pairs: bool = False,
    progress: Progress = True,
    **changes: Any,
) -> Score:
    """Draws held-out captions and reads the pictures back.

    Only what a caption says is asked for: unsaid attributes have no right value.

    Args:
        pipe: a pipeline of the embedded world.
        count: captions, none of them ever trained on.
        seed: picks captions and noise.
        pairs: captions of colour-shape pairs that training never shows, instead of seen pairs.
        progress: shown by default, or a function of a `ProgressEvent`, or False.
        **changes: pipeline arguments instead of `zoo.SETTINGS`.
    """
    drawn = data.held_out_scenes(count, seed, pairs)
    keys = (*ATTRIBUTES, "one", "two")
    right: dict[str, int] = dict.fromkeys(keys, 0)
    asked: dict[str, int] = dict.fromkeys(keys, 0)
    for scene, reading in _read_back(pipe, drawn, seed, progress, changes):
        verdict = judge(scene, reading)
        for name, hit in verdict:
            right[name] += hit
            asked[name] += 1
        whole = "one" if len(scene.objects) == 1 else "two"
        right[whole] += all(hit for _, hit in verdict) and len(reading.objects) == len(
            scene.objects
        )
        asked[whole] += 1
    return Score(right, asked)


def _read_back(
    pipe: Any, drawn: list[scenes.Scene], seed: int, progress: Progress, changes: Mapping[str, Any]
) -> list[tuple[scenes.Scene, Reading]]:
    found = []
    with show_progress(progress) as report, pipeline_steps(pipe, lambda step, steps: None):
        for start in track(range(0, len(drawn), BATCH), "batches", report):
            batch = drawn[start : start + BATCH]
            pictures = draw(pipe, batch, seed + start, **changes)
            found += zip(batch, detect(pictures), strict=True)
    return found


def draw(pipe: Any, batch: list[scenes.Scene], seed: int, **changes: Any) -> torch.Tensor:
    """Pictures of scenes' captions, [n, 3, 64, 64] in [0, 1]; row i starts from seed + i."""
    generators = [torch.Generator().manual_seed(1000 + seed + i) for i in range(len(batch))]
    captions = [scene.caption() for scene in batch]
    out = pipe(captions, generator=generators, output_type="pt", **settings(**changes))
    return out.images


def judge(scene: scenes.Scene, reading: Reading) -> list[tuple[str, bool]]:
    """(attribute, right) for all that the caption says, objects matched as well as possible."""
    regions: list[Found | None] = list(reading.objects[:2])
    regions += [None] * (2 - len(regions))
    matches = [
        [
            pair
            for obj, region in zip(scene.objects, order, strict=False)
            for pair in _judge_object(obj, region)
        ]
        for order in itertools.permutations(regions)
    ]
    verdict = max(matches, key=lambda pairs: sum(hit for _, hit in pairs))
    if scene.background_said:
        verdict.append(("background", reading.background == scene.background))
    return [*verdict, ("frame", reading.frame == scene.frame)]


def _judge_object(obj: scenes.Obj, region: Found | None) -> list[tuple[str, bool]]:
    out = [("shape", region is not None and region.shape == obj.shape)]
    if "color" in obj.said:
        out.append(("color", region is not None and region.color == obj.color))
    if "size" in obj.said:
        out.append(("size", region is not None and region.size == obj.size))
    if "place" in obj.said:
        placed = region is not None and (region.row, region.column) == (obj.row, obj.column)
        out.append(("position", placed))
    return out
