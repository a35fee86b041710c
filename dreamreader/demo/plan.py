"""Everything that the demo is free to choose, in one value that the fingerprint covers."""

from dataclasses import dataclass, replace

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.zoo import SETTINGS, scenes

WINDOWS = {"all steps": (0.0, 1.0), "first half": (0.0, 0.5), "second half": (0.5, 1.0)}
"""Step windows and their share of the steps; the sweep crosses them with sites and strengths."""


@dataclass(frozen=True)
class DemoPlan:
    """Sizes and settings of the demo.

    Attributes:
        source, target: the colour that prompts name, and the one to steer to.
        fit: scenes recorded in every colour. choose, refine, test, patch: rows of the other sets.
        finalists: settings of the sweep that are also drawn on the `refine` rows before the choice.
        curve: test rows that are drawn at every strength; `test` are drawn at the chosen one.
        strengths: multiples of the mean difference.
        windows: number of equal step windows of the patching heat map.
        keep: share of kept shapes and places below which the page sets a cell in brackets.
        batch: rows per call of the pipeline.
    """

    source: str = "red"
    target: str = "blue"
    seed: int = 0
    steps: int = int(SETTINGS["num_inference_steps"])
    guidance: float = float(SETTINGS["guidance_scale"])
    fit: int = 8
    choose: int = 3
    refine: int = 9
    finalists: int = 5
    test: int = 40
    patch: int = 3
    curve: int = 10
    strengths: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    windows: int = 4
    keep: float = 0.8
    batch: int = 48

    def __post_init__(self):
        for color in (self.source, self.target):
            if color not in scenes.COLORS:
                raise UnknownName("colour", color, scenes.COLORS)
        if self.source == self.target:
            raise InvalidInput(f"source and target colour are both {self.source}")
        if self.steps < self.windows:
            raise InvalidInput(f"{self.windows} step windows need as many steps, got {self.steps}")

    def small(self) -> "DemoPlan":
        """A few pictures of everything: to see that it works, not to believe its numbers."""
        return replace(
            self,
            steps=8,
            fit=2,
            choose=2,
            refine=2,
            finalists=2,
            test=4,
            patch=1,
            curve=2,
            strengths=(1.0, 2.0),
            windows=2,
        )

    def window(self, name: str) -> range:
        """The steps of a named window."""
        start, stop = WINDOWS[name]
        return range(round(start * self.steps), round(stop * self.steps))

    @property
    def patch_windows(self) -> list[range]:
        edges = [round(i * self.steps / self.windows) for i in range(self.windows + 1)]
        return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]
