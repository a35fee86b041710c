"""What the demo draws: scenes in several colours, split so that the test set chooses nothing."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dreamreader.demo.plan import DemoPlan
from dreamreader.errors import InvalidInput
from dreamreader.zoo import scenes


@dataclass(frozen=True)
class SceneRow:
    """A scene with one object and the seed of its noise."""

    scene: scenes.Scene
    seed: int

    def prompt(self, color: str) -> str:
        """The caption of the scene with the object in `color`."""
        obj = replace(self.scene.objects[0], color=color)
        return replace(self.scene, objects=(obj,)).caption()


@dataclass(frozen=True)
class SceneSplit:
    """Disjoint scenes: directions come from `fit`, the setting from `choose` and `refine`."""

    fit: Sequence[SceneRow]
    choose: Sequence[SceneRow]
    refine: Sequence[SceneRow]
    test: Sequence[SceneRow]
    patch: Sequence[SceneRow]


def split(plan: DemoPlan) -> SceneSplit:
    """Draws the five sets; no scene and no seed is in two of them.

    Args:
        plan: how many rows each set has, the colours, and the seed of the draw.

    Returns:
        Scenes with one object, all of whose attributes the caption says. Shapes that training never
        showed in the source or the target colour are left out.

    Raises:
        InvalidInput: the plan asks for more scenes than there are.
    """
    shapes = [
        shape
        for shape in scenes.SHAPES
        if not {(plan.source, shape), (plan.target, shape)} & scenes.HELD_OUT_PAIRS
    ]
    every = [
        scenes.Scene((scenes.Obj(shape, plan.source, size, row, column),), background)
        for shape, size, row, column, background in itertools.product(
            shapes, scenes.SIZES, scenes.ROWS, scenes.COLUMNS, scenes.BACKGROUNDS
        )
    ]
    rng = random.Random(plan.seed)
    rng.shuffle(every)
    sizes = (plan.fit, plan.choose, plan.refine, plan.test, plan.patch)
    if sum(sizes) > len(every):
        raise InvalidInput(f"the demo needs {sum(sizes)} scenes, there are {len(every)}")
    framed = [replace(scene, frame=rng.random() < scenes.FRAMED) for scene in every[: sum(sizes)]]
    first = 10_000 * (plan.seed + 1)
    rows = iter([SceneRow(scene, first + i) for i, scene in enumerate(framed)])
    return SceneSplit(*(list(itertools.islice(rows, size)) for size in sizes))
