"""What changed latents did: each at its best strength, and success against distance."""

from typing import Any

from dreamreader.experiments.pages.base import curves
from dreamreader.experiments.pages.compared import STILL, ComparedPage, Line
from dreamreader.experiments.pages.sae_chosen import SUCCESS, ChosenLatents
from dreamreader.experiments.results import Results, format_interval
from dreamreader.report import Section, Table


class SaePage(ComparedPage):
    """Every set of latents beside its control, curves over strength, and all settings."""

    setting = ("features", "cell", "strength")

    def __init__(self, results: Results):
        super().__init__(results)
        choose = self.method.choose
        # what latents that the run chose did; None where the spec names them
        self.chosen = None if choose is None else ChosenLatents(results, choose)
        if self.chosen is not None:
            self.results = self.chosen.results

    @property
    def columns(self) -> list[str]:
        return super().columns if self.chosen is None else self.chosen.columns[:8]

    def pictured_setting(self) -> dict[str, Any]:
        if self.chosen is None:
            return self.best()
        first = self.chosen.edits[0]
        return {"features": first.name, "strength": first.strength}

    def lines(self) -> list[Line]:
        if self.chosen is not None:
            return self._chosen_lines(self.chosen)
        results = self.results
        found = [self._line(n.replace("_", " "), n, {}) for n in STILL if results.of(n)]
        best = self.best()
        found.append(self._line(f"latents {best['features']}", "edited", best))
        if results.of("random_features"):  # at the same place and strength
            found.append(self._line("others of the same frequency", "random_features", best))
        return found

    def _chosen_lines(self, chosen: ChosenLatents) -> list[Line]:
        """Each kind of edit over all labels, at the strengths of the trials."""
        found = []
        for kind in chosen.kinds:
            own = chosen.of_kind(kind)
            means = {name: chosen.mean(own, name) for name in self.columns}
            found.append(Line(kind, own[0].condition, {}, means))
        return found

    def summary(self) -> list[str]:
        told = super().summary()
        if self.chosen is None:
            return told
        for each in self.chosen.edits:
            mean = format_interval(self.chosen.mean([each], SUCCESS))
            which = f" {', '.join(map(str, each.features))}" if each.features else ""
            told.append(f"  {each.label}: {each.kind}{which} at {each.strength:g}: {mean}")
        return told

    def sections(self) -> list[Section]:
        if self.chosen is not None:
            return [*self.chosen.sections(), self._every()]
        best = self.best()
        at = {name: best[name] for name in ("features", "cell")}
        lines = {
            name.replace("_", " "): self.results.of(name, **at)
            for name in ("edited", "random_features")
            if self.results.of(name)
        }
        found = [Section("Latents", [self.table()], "The best setting, and its control.")]
        if len(self.method.strengths) > 1:
            title = f"Strength of {best['features']}"
            found.append(Section(title, [curves(self.results, "strength", lines)]))
        return [*found, self._by_set(), self._every()]

    def _by_set(self) -> Section:
        """Each set of latents at the place and strength where it did most."""
        rows = []
        for name in self.method.sets:
            best = self.best(features=name)
            own = [self.results.mean("edited", each, **best) for each in self.columns]
            where = f"{best['cell']}, {best['strength']:g}"
            rows.append((name, where, *map(format_interval, own)))
        rows.sort(key=lambda row: self._value(row[0]), reverse=True)
        heads = ("latents", "setting", *self.columns)
        return Section("Each set at its best", [Table(heads, rows, "Means with 95 % intervals.")])

    def _every(self) -> Section:
        results, rows = self.results, []
        keys = dict.fromkeys(
            (row["condition"], *(row.get(name) for name in self.setting))
            for row in results.rows
            if row["condition"] not in STILL
        )
        for condition, *values in keys:
            where = dict(zip(self.setting, values, strict=True))
            means = [format_interval(results.mean(condition, n, **where)) for n in self.columns]
            rows.append((condition.replace("_", " "), *values, *means))
        return Section("Every setting", [Table(("condition", *self.setting, *self.columns), rows)])

    def _value(self, name: str) -> float:
        value = self.results.mean("edited", self.effect, **self.best(features=name)).value
        return float(value)

    def _line(self, label: str, condition: str, setting: dict[str, Any]) -> Line:
        means = {name: self.results.mean(condition, name, **setting) for name in self.columns}
        return Line(label, condition, setting, means)
