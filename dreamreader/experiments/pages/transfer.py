"""What mapped directions did, as a share of what the subject's own direction does."""

from typing import Any

from dreamreader.experiments.pages.base import axis_gallery, interval_number
from dreamreader.experiments.pages.compared import STILL, ComparedPage, Line
from dreamreader.experiments.results import Found, format_interval
from dreamreader.mapping import ActivationMap
from dreamreader.report import Number, Section, Table
from dreamreader.stats import Interval, ratio_of_means

FIXED = ("native", "random_direction", "unmapped")


class TransferPage(ComparedPage):
    """Every map and control at its best setting, its share of the native effect, and the maps."""

    setting = ("map", "cell", "strength")

    def shares(self) -> dict[str, Interval]:
        """Share of the native effect of each line, with an interval over prompts.

        Formula: (mean effect - mean of unedited rows) / (the same of `native`), of the same prompts
            and seeds. Prompts are drawn whole, with all of their seeds.
        """
        base = self._values(self.results.of("unedited"))
        keys = [key for key, value in base.items() if value is not None]
        lines = [line for line in self.lines() if line.condition not in STILL]
        counts = all(isinstance(base[key], bool) for key in keys)
        gains = {}
        for line in lines:
            found = self._values(self.results.of(line.condition, **_known(line.setting)))
            sums: dict[str, float] = {}
            for key in keys:
                gain = float(found[key] or 0) - float(base[key] or 0)
                sums[key[0]] = sums.get(key[0], 0.0) + gain
            gains[line.label] = list(sums.values())
        native = gains.pop("native")
        found = ratio_of_means(list(gains.values()), native, within=counts)
        return {"native": ratio_of_means([native], native)[0]} | dict(
            zip(gains, found, strict=True)
        )

    def lines(self) -> list[Line]:
        results = self.results
        found = [self._line(n.replace("_", " "), n, {}) for n in STILL if results.of(n)]
        found.append(self._line("native", "native", self.best("native")))
        for name in self.method.named_maps:
            found.append(self._line(name, "edited", self.best(map=name)))
        for name in FIXED[1:]:
            if results.of(name):
                found.append(self._line(name.replace("_", " "), name, self.best(name)))
        if results.of("mean_ablated"):
            found.append(self._line("mean ablated", "mean_ablated", {}))
        return found

    def numbers(self) -> list[Number]:
        return [
            interval_number(share, f"share of the native effect, {name}")
            for name, share in self.shares().items()
            if name != "native"
        ]

    def summary(self) -> list[str]:
        shares = self.shares()
        told = super().summary()
        return (
            told
            + [
                f"  share of the native effect, {name}: {format_interval(share)}"
                for name, share in shares.items()
                if name != "native"
            ]
            + [f"  {each}" for each in self.doubts()]
        )

    def doubts(self) -> list[str]:
        """What makes the shares no measure: a native direction that does not raise the effect."""
        told = {line.label: line.columns[self.effect].value for line in self.lines()}
        if told["native"] > told["unedited"]:
            return []
        return [f"native does not raise {self.effect} at any strength: shares of it say nothing"]

    def sections(self) -> list[Section]:
        text = "Every condition at its best setting; shares of what the native direction changes."
        text = ". ".join([text.rstrip("."), *self.doubts()]) + "."
        pictures = axis_gallery(self.results.where(cell=self.best()["cell"]), "strength", "edited")
        return [
            Section("Transfer", [self._shares(), self.table()], text),
            self._maps(),
            *([Section("The first prompts, strength by strength", pictures)] if pictures else []),
        ]

    def _shares(self) -> Table:
        rows = [(name, format_interval(share)) for name, share in self.shares().items()]
        return Table(("condition", "share of the native effect"), rows, "With 95 % intervals.")

    def _maps(self) -> Section:
        folder, rows = self.results.folder.path, []
        cells = dict.fromkeys(r["cell_json"] for r in self.results.of("edited"))
        chosen = (next(r for r in self.results.of("edited") if r["cell_json"] == c) for c in cells)
        sites = dict.fromkeys(site for row in chosen for site in self.results.cell(row).sites)
        for name in self.method.named_maps:
            for site in sites:
                scores = ActivationMap.load(self.method.map_file(folder, name, site)).card.scores
                numbers = (scores[key] for key in ("fvu", "cosine", "cka", "retrieval"))
                rows.append((name, site, *(f"{each:.3f}" for each in numbers)))
        head = ("map", "site", "FVU", "cosine", "CKA", "top-1")
        return Section("Maps", [Table(head, rows)], "On a fifth of their prompts, held out.")

    def _line(self, label: str, condition: str, setting: dict[str, Any]) -> Line:
        where = _known(setting)
        means = {name: self.results.mean(condition, name, **where) for name in self.columns}
        return Line(label, condition, setting, means)

    def _values(self, rows: list[Found]) -> dict[tuple[str, int], Any]:
        return {(row["item"], row["seed"]): row[self.effect] for row in rows}


def _known(setting: Any) -> dict[str, Any]:
    return {name: value for name, value in setting.items() if value is not None}
