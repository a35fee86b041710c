"""Removal: what is special about a colour is projected out of the text branch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dreamreader.demo.bench import Bench
from dreamreader.demo.data import SceneRow
from dreamreader.demo.directions import SiteGroup, controls
from dreamreader.demo.measure import Outcome, judge
from dreamreader.edits import Ablate
from dreamreader.steering import LabelMeans
from dreamreader.zoo.detector import detect


@dataclass(frozen=True)
class Removal:
    """Pictures and outcomes by condition: "no edit", "projected out", "random projected out"."""

    rows: Sequence[SceneRow]
    images: Mapping[str, Float[Tensor, "n 3 h w"]]
    outcomes: Mapping[str, Outcome]


def remove(bench: Bench, rows: Sequence[SceneRow], place: SiteGroup, means: LabelMeans) -> Removal:
    """Projects one direction per site and step out: the colour's mean less the mean of all others.

    Args:
        bench: the subject and its settings.
        rows: rows that had no part in fitting.
        place: sites to edit.
        means: label means of all colours.
    """
    plan = bench.plan
    special = {site: means.contrast(site, plan.source) for site in place.sites}
    prompts, seeds = [row.prompt(plan.source) for row in rows], [row.seed for row in rows]
    images = {"no edit": bench.draw(prompts, seeds)}
    for name, vectors in (
        ("projected out", special),
        ("random projected out", controls(special, plan.seed + 2)),
    ):
        images[name] = bench.draw(prompts, seeds, project(place, vectors), f"remove, {name}")
    unedited = detect(images["no edit"])
    outcomes = {
        name: judge(drawn, unedited, plan.source, plan.target) for name, drawn in images.items()
    }
    return Removal(rows, images, outcomes)


def project(place: SiteGroup, vectors: Mapping[str, Tensor]) -> list[Ablate]:
    """One projection for each step, each with the directions of that step."""
    steps = len(next(iter(vectors.values())))
    return [
        Ablate(
            tuple(place.sites),
            "project",
            direction={site: v[step] for site, v in vectors.items()},
            steps=step,
            branch="cond",
        )
        for step in range(steps)
    ]
