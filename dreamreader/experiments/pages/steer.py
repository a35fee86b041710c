"""What a steering run found: dose and response, where it worked, and what speaks for it."""

from typing import Any

import numpy as np

from dreamreader.experiments.pages.base import MethodPage, axis_gallery, curves, interval_number
from dreamreader.experiments.pages.compared import best_setting
from dreamreader.experiments.results import format_interval
from dreamreader.report import HeatMap, Number, Section, Table
from dreamreader.stats import Interval
from dreamreader.steering import Directions

SWEPT = ("edited", "random_direction", "shuffled_labels")


class SteerPage(MethodPage):
    """Curves at the best cell, heat maps over all, and the evidence of the directions."""

    def numbers(self) -> list[Number]:
        """The best setting, and what the same strength of each control does."""
        means = self._at(**self.pictured_setting())
        return [interval_number(mean, f"{self._column}, {name}") for name, mean in means.items()]

    def pictured_setting(self) -> dict[str, Any]:
        """The best cell and strength."""
        return best_setting(self.results, self._column, ("cell", "strength"))

    def sections(self) -> list[Section]:
        results, cell = self.results, self.pictured_setting()["cell"]
        lines = {name: results.of(name, cell=cell) for name in SWEPT if results.of(name)}
        lead = f"At {cell}, the cell with the largest {self._column.replace('_', ' ')}."
        title = "The first prompts, strength by strength"
        pictures = axis_gallery(results.where(cell=cell), "strength", "edited")
        return [
            Section("Strength", [curves(results, "strength", lines)], lead),
            Section("Sites and windows", [self._heat_map()]),
            *([Section(title, pictures)] if pictures else []),
            *self._evidence(),
        ]

    def summary(self) -> list[str]:
        """The best setting beside its controls."""
        best, still = self.pictured_setting(), ("unedited", "target_prompt")
        means = {n: self.results.mean(n, self._column) for n in still if self.results.of(n)}
        means |= self._at(**best)
        return [
            f"  best by {self._column}: {best['cell']}, strength {best['strength']:g}",
            *(f"  {n.replace('_', ' '):<18} {format_interval(m)}" for n, m in means.items()),
        ]

    @property
    def _column(self) -> str:
        return self.results.effect_column(self.method.effect, "edited", "unedited")

    def _at(self, **setting: Any) -> dict[str, Interval]:
        """The effect of every swept condition at a setting."""
        results = self.results
        return {n: results.mean(n, self._column, **setting) for n in SWEPT if results.of(n)}

    def _heat_map(self) -> HeatMap:
        results, column = self.results, self._column
        rows = results.of("edited")
        cells = list(dict.fromkeys(row["cell"] for row in rows))
        strengths = sorted({row["strength"] for row in rows})
        means = [
            [results.mean("edited", column, cell=cell, strength=s) for s in strengths]
            for cell in cells
        ]
        values = np.array([[each.value for each in line] for line in means])
        return HeatMap(
            f"{column.replace('_', ' ')} by cell and strength",
            values,
            cells,
            [f"{s:g}" for s in strengths],
            limit=max(1.0, float(np.nanmax(np.abs(values)))),
            percent=bool(np.nanmax(np.abs(values)) <= 1),
            notes=[[format_interval(each) for each in line] for line in means],
        )

    def _evidence(self) -> list[Section]:
        directions = Directions.load(self.method.directions_file(self.results.folder.path))
        if not directions.evidence:
            return []
        rows = []
        for site, each in directions.evidence.items():
            spans = [_span(v) for v in (each.auc, each.auc_shuffled, each.auc_random)]
            rows.append((site, f"{each.rows[0]} + {each.rows[1]}", *spans, _span(each.split_half)))
        table = Table(
            ("site", "rows", "AUC held out", "AUC shuffled", "AUC random", "split-half cosine"),
            rows,
            "Lowest to highest over the steps. AUC: how often a target row that had no part in the "
            "fit lies further along the direction than a source row; 0.5 is chance.",
        )
        return [Section("Directions", [table], f"{directions.method}, norm {directions.norm}.")]


def _span(values: tuple[float, ...]) -> str:
    known = [value for value in values if value == value]
    if not known:
        return "–"
    low, high = min(known), max(known)
    return f"{low:.2f}" if len(known) == 1 else f"{low:.2f} – {high:.2f}"
