"""What learned edits did: beside their controls, over strength, rank and sites."""

from typing import Any

from dreamreader.experiments.methods.reft_adapters import evidence_name
from dreamreader.experiments.pages.base import curves
from dreamreader.experiments.pages.compared import STILL, ComparedPage, Line
from dreamreader.experiments.results import format_interval
from dreamreader.report import Section, Table

CONTROLS = ("untrained", "difference")


class ReftPage(ComparedPage):
    """Every variant and control at its best setting, curves, all settings, and the training."""

    setting = ("variant", "rank", "cell", "strength")

    def sections(self) -> list[Section]:
        return [
            Section("Learned edits", [self.table()], "Every condition at its best setting."),
            *self._curves(),
            self._every(),
            *self._training(),
        ]

    def lines(self) -> list[Line]:
        results = self.results
        found = [self._line(n.replace("_", " "), n, {}) for n in STILL if results.of(n)]
        for variant in dict.fromkeys(self.method.variants):
            found.append(self._line(variant, "edited", self.best(variant=variant)))
        if results.of("untrained"):  # at the place and strength of the trained ones
            chosen = self.best()
            same = {name: chosen[name] for name in ("cell", "strength")}
            found.append(self._line("untrained", "untrained", self.best("untrained", **same)))
        if results.of("difference"):
            chosen = self.best("difference")
            found.append(self._line("difference of means", "difference", chosen))
        return found

    def _line(self, label: str, condition: str, setting: dict[str, Any]) -> Line:
        where = {name: value for name, value in setting.items() if value is not None}
        means = {name: self.results.mean(condition, name, **where) for name in self.columns}
        return Line(label, condition, setting, means)

    def _curves(self) -> list[Section]:
        """Over strength and over rank, all else as in the best setting."""
        method, results, at = self.method, self.results, self.best()
        cell, found = at["cell"], []
        if len(method.strengths) > 1:
            same = {name: at[name] for name in ("variant", "rank", "cell")}
            lines = {at["variant"]: results.of("edited", **same)}
            for name in CONTROLS:
                if results.of(name, cell=cell):
                    lines[name] = results.of(name, cell=cell)
            found.append(Section("Strength", [curves(results, "strength", lines)], f"At {cell}."))
        if len(method.ranks) > 1:
            lines = {
                variant: results.of("edited", variant=variant, cell=cell, strength=at["strength"])
                for variant in method.variants
            }
            found.append(Section("Rank", [curves(results, "rank", lines)], f"At {cell}."))
        return found

    def _every(self) -> Section:
        """All settings in a table: the number of sites shows in the cells."""
        results, names = self.results, self.columns
        keys = dict.fromkeys(
            (row["condition"], *(row.get(name) for name in self.setting))
            for row in results.rows
            if row["condition"] not in STILL
        )
        rows = []
        for condition, *values in keys:
            pairs = zip(self.setting, values, strict=True)
            where = {name: value for name, value in pairs if value is not None}
            means = [format_interval(results.mean(condition, name, **where)) for name in names]
            rows.append((condition, *("" if v is None else v for v in values), *means))
        return Section("Every setting", [Table(("condition", *self.setting, *names), rows)])

    def _training(self) -> list[Section]:
        rows: list[tuple[Any, ...]] = []
        while (one := self.results.folder.read(evidence_name(len(rows)))) is not None:
            held = [value for _, value in one["validation"]]
            losses = (f"{held[0]:.4g}", f"{min(held):.4g}") if held else ("–", "–")
            kind = (one["cell"], one["variant"], one["rank"] or "")
            rows.append((*kind, f"{one['parameters']:,}", one["steps"], *losses))
        columns = ("cell", "variant", "rank", "parameters", "steps", "first held-out loss", "best")
        return [Section("Training", [Table(columns, rows)], "Losses on held-out pairs.")]
