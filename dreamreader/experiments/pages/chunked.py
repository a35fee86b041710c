"""What cells of a grid did whose rows take activations from others: patching and ablation."""

from typing import Any, ClassVar

from dreamreader.experiments.pages.base import MethodPage
from dreamreader.experiments.pages.grids import (
    grid_numbers,
    grid_of,
    grid_sections,
    grid_summary,
    largest,
    reproduction,
)
from dreamreader.experiments.results import Results
from dreamreader.report import Number, Section
from dreamreader.sweep import Grid


class ChunkedPage(MethodPage):
    """Heat maps of effects, of the changed rows and of their control."""

    control_title: ClassVar[str]

    def grid(self, condition: str) -> Grid:
        """Effects of the cells of a condition."""
        m = self.method
        return grid_of(self.results, condition, m.effect, m.base, m.goal, self.floor)

    @property
    def floor(self) -> float | None:
        """Value of the effect's column at the other end, where no condition is."""
        return None

    def numbers(self) -> list[Number]:
        control = self.grid(self.method.control) if self._has_control else None
        return grid_numbers(self.grid(self.method.changed), control, self._column)

    def pictured_setting(self) -> dict[str, Any]:
        return {"cell": largest(self.grid(self.method.changed)).label}

    def sections(self) -> list[Section]:
        changed = self.grid(self.method.changed)
        grids = {self.method.changed: changed}
        if self._has_control:
            grids[self.control_title] = self.grid(self.method.control)
        return [*grid_sections(grids, self._column), *reproduction(changed)]

    def summary(self) -> list[str]:
        lines = grid_summary(self.grid(self.method.changed))
        if self._has_control:
            control = self.grid(self.method.control)
            lines += [f"{self.control_title}:", *grid_summary(control, 2)]
        return lines

    @property
    def _has_control(self) -> bool:
        return bool(self.results.of(self.method.control))

    @property
    def _column(self) -> str:
        m = self.method
        return self.results.effect_column(m.effect, m.goal or m.changed, m.base)


class PatchingPage(ChunkedPage):
    """Of patches and of windows of layers."""

    control_title: ClassVar[str] = "from another corrupted run (control)"


class AblatePage(ChunkedPage):
    """Of ablations."""

    control_title: ClassVar[str] = "random sites of the same sizes (control)"

    @property
    def floor(self) -> float | None:
        return self.method.floor


def effects(results: Results, condition: str) -> Grid:
    """Effects of the cells of a condition, of a run whose rows take activations from others.

    Args:
        results: of the methods patch, windows or ablate. condition: such as `patched`.

    Example:
        >>> from dreamreader.experiments import load_results
        >>> found = effects(load_results("runs/red-to-blue"), "patched").top(3)
    """
    kind = AblatePage if results.spec.method.kind == "ablate" else PatchingPage
    return kind(results).grid(condition)
