"""What a guidance run found: how many rows reached their labels, and what else changed."""

from collections.abc import Sequence

from dreamreader.experiments.methods.guide import UNIFORM
from dreamreader.experiments.methods.guide_probes import probe_file
from dreamreader.experiments.pages.base import curves
from dreamreader.experiments.pages.compared import STILL, ComparedPage, Line
from dreamreader.experiments.results import Found, axis_values, mean_interval
from dreamreader.probes import Probe
from dreamreader.report import Section
from dreamreader.stats import Interval
from dreamreader.stats.variation import variation_to_uniform


class GuidePage(ComparedPage):
    """The conditions side by side, curves over strength and inner steps, and the probes."""

    setting = ("cell", "strength", "iterations")

    def sections(self) -> list[Section]:
        return [Section("Guidance", [self.table()]), *self._curves(), *self._probes()]

    def lines(self) -> list[Line]:
        """Every condition at its best setting; the random probe at that of the probe."""
        chosen = self.best()
        settings = {name: {} for name in STILL} | {"edited": chosen, "random_probe": chosen}
        if self.results.of("difference"):
            settings["difference"] = self.best("difference")
        return [
            Line(name.replace("_", " "), name, where, self._means(rows))
            for name, where in settings.items()
            if (rows := self.results.of(name, **where))
        ]

    def _means(self, rows: Sequence[Found]) -> dict[str, Interval]:
        method = self.method
        means = {name: mean_interval(row.get(name) for row in rows) for name in self.columns}
        for attribute, label in method.target.items():
            if label == UNIFORM and rows and attribute in rows[0]:
                labels = method.labels_of(method.fit_items(), attribute)
                seen = [str(row[attribute]) for row in rows]
                means[f"variation of {attribute}"] = variation_to_uniform(seen, labels)
        return means

    def _curves(self) -> list[Section]:
        """At the best cell; the random probe with the inner steps of the best setting."""
        results, at = self.results, self.best()
        cell, found = at["cell"], []
        if len(self.method.strengths) > 1:
            lines = {
                f"{inner} inner steps": results.of("edited", cell=cell, iterations=inner)
                for inner in axis_values(results.of("edited"), "iterations")
            }
            controls = {"random_probe": {"iterations": at["iterations"]}, "difference": {}}
            for name, where in controls.items():
                if rows := results.of(name, cell=cell, **where):
                    lines[name] = rows
            found.append(Section("Strength", [curves(results, "strength", lines)], f"At {cell}."))
        if len(self.method.iterations) > 1:
            lines = {
                f"strength {strength:g}": results.of("edited", cell=cell, strength=strength)
                for strength in self.method.strengths
            }
            charts = curves(results, "iterations", lines)
            found.append(Section("Inner steps", [charts], f"At {cell}."))
        return found

    def _probes(self) -> list[Section]:
        """The card of every probe."""
        found: list[Section] = []
        while (file := probe_file(self.results.folder.path, len(found))).is_file():
            found.append(Probe.load(file).card.section())
        return found
