"""Patching: activations of the run with the target colour, put into the run with the source."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.demo.bench import Bench, as_tensor
from dreamreader.demo.data import SceneRow
from dreamreader.demo.directions import SiteGroup
from dreamreader.demo.measure import main
from dreamreader.edits import Patch
from dreamreader.engine import Record
from dreamreader.metrics.tint import tint
from dreamreader.stats import Interval, bootstrap
from dreamreader.zoo.detector import detect


@dataclass(frozen=True)
class PatchOutcome:
    """How much of the clean colour each place and window brings back.

    Attributes:
        effect: [places][windows]; 0 is the corrupted run, 1 the clean one.
        images: pictures of row 0: "clean", "corrupted", then "<place>, <window>" where drawn.
        rows: rows with an object in the corrupted picture, on which the effect rests.
    """

    places: Sequence[str]
    windows: Sequence[str]
    effect: Sequence[Sequence[Interval]]
    clean: Float[Tensor, "n 3 h w"]
    corrupted: Float[Tensor, "n 3 h w"]
    patched: Sequence[Float[Tensor, "windows 3 h w"]]
    rows: int


def patch(bench: Bench, rows: Sequence[SceneRow], places: Sequence[SiteGroup]) -> PatchOutcome:
    """Runs the prompts in the target colour (clean), in the source colour (corrupted), and patched.

    `effect = (t_patched - t_corrupted) / (t_clean - t_corrupted)`, t the tint of the main object.
    All windows of a place are rows of one run.

    Args:
        bench: the subject and its settings.
        rows: one pair of runs each, with the same noise.
        places: sites that are patched together.
    """
    plan = bench.plan
    seeds = [row.seed for row in rows]
    sites = sorted({site for place in places for site in place.sites})
    wanted = [Record(site, branch="cond") for site in sites]
    clean = bench.run([row.prompt(plan.target) for row in rows], seeds, record=wanted)
    corrupted = bench.draw([row.prompt(plan.source) for row in rows], seeds)
    windows = [*plan.patch_windows, range(plan.steps)]
    many = [row for _ in windows for row in rows]
    prompts, again = [row.prompt(plan.source) for row in many], [row.seed for row in many]
    tints, pictures = [], []
    shown = _TintShare(as_tensor(clean.images), corrupted, plan.source, plan.target)
    for place in places:
        edits = [
            Patch(
                tuple(place.sites),
                clean.cache,
                steps=window,
                branch="cond",
                strength=[float(i == j) for j in range(len(windows)) for _ in rows],
                from_rows=list(range(len(rows))) * len(windows),
            )
            for i, window in enumerate(windows)
        ]
        drawn = bench.draw(prompts, again, edits, f"patch {place.name}")
        drawn = drawn.unflatten(0, (len(windows), len(rows)))
        tints.append([shown.effect(drawn[i]) for i in range(len(windows))])
        pictures.append(drawn[:, 0])
    return PatchOutcome(
        places=[place.name for place in places],
        windows=[*(f"{w.start}–{w.stop - 1}" for w in windows[:-1]), "all"],
        effect=tints,
        clean=shown.clean,
        corrupted=corrupted,
        patched=pictures,
        rows=int(shown.there.sum()),
    )


class _TintShare:
    """The tint of a row's main object, looked for where the corrupted picture has it."""

    def __init__(self, clean: Tensor, corrupted: Tensor, source: str, target: str):
        self.clean, self.colors = clean, (source, target)
        objects = [main(reading) for reading in detect(corrupted)]
        size = corrupted.shape[-2:]
        nothing = torch.zeros(size, dtype=torch.bool)
        self.masks = torch.stack([nothing if o is None else o.mask for o in objects])
        self.there = torch.tensor([o is not None for o in objects])
        self.low = tint(corrupted, self.masks, *self.colors)
        self.high = tint(clean, self.masks, *self.colors)

    def effect(self, images: Tensor) -> Interval:
        """Share of the way from corrupted to clean, a ratio of means over rows with an object."""
        moved = tint(images, self.masks, *self.colors) - self.low
        pairs = torch.stack([moved, self.high - self.low], 1)[self.there]
        if not len(pairs):
            return Interval(float("nan"), float("nan"), float("nan"), 0)
        return bootstrap(
            pairs.numpy(), lambda p: float(p[:, 0].sum() / p[:, 1].sum()), resamples=500
        )
