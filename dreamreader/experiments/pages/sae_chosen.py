"""What chosen latents did to pictures they were not chosen on: by label, strength and distance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dreamreader.experiments.methods.sae_choice import LatentChoice, set_name
from dreamreader.experiments.methods.sae_trials import CHOICE, DIFFERENCE
from dreamreader.experiments.results import Found, Results, format_interval, mean_interval
from dreamreader.report import Charts, Curves, Section, Series, Table
from dreamreader.stats import Interval

SUCCESS, REACHED = "success", "reached"  # columns that follow from those of metrics


@dataclass(frozen=True)
class ChosenEdit:
    """An edit of a label at the strength that its trial found best.

    Attributes:
        label: what it adds or removes. kind: what it is, for all labels. condition: of its rows.
        name: of its rows' `features`. strength: see there. features: latents, none of a difference.
        tried: share of the trial's pictures that succeeded; None of random latents, not tried.
    """

    label: str
    kind: str
    condition: str
    name: str
    strength: float
    features: tuple[int, ...]
    tried: float | None

    def rows(self, results: Results, strength: float | None = None) -> list[Found]:
        """Its rows, of the chosen strength or of another."""
        at = self.strength if strength is None else strength
        return results.of(self.condition, features=self.name, strength=at)


class ChosenLatents:
    """Reads a run whose latents were chosen.

    Args:
        results: of the run, with the columns `success` and `reached` beside those of metrics.
        choose: what was asked for.
    """

    def __init__(self, results: Results, choose: LatentChoice):
        self.choose = choose
        self.results = replace(
            results,
            rows=[self._judged(row) for row in results.rows],
            metrics=[SUCCESS, REACHED, *results.metrics],
        )

    def _judged(self, row: Found) -> Found:
        choose, known = self.choose, row.get("target") is not None
        reached = choose.reached(row) if known else None
        return {**row, SUCCESS: choose.succeeded(row) if known else None, REACHED: reached}

    @property
    def columns(self) -> list[str]:
        """Success, its parts, and the other numbers, without what success is made of."""
        first = [SUCCESS, REACHED, self.choose.kept]
        seen = {*first, self.choose.success}
        return [*first, *(name for name in self.results.numbers if name not in seen)]

    @cached_property
    def edits(self) -> list[ChosenEdit]:
        """Every edit, label by label; controls behind the latents."""
        found = []
        labels: Mapping[str, Any] = self.results.folder.need(CHOICE)["labels"]
        for label, own in labels.items():
            sets: Mapping[str, Any] = own["sets"]
            for condition, control in (("edited", ""), ("random_features", ", random")):
                if not self.results.of(condition):
                    continue
                for size in self.choose.sizes:
                    name = set_name(label, size)
                    kind = f"{_count(size)}{control}"
                    found.append(_edit(label, kind, condition, name, sets[name]))
            if DIFFERENCE in own:
                kind = "difference of means"
                found.append(_edit(label, kind, DIFFERENCE, label, own[DIFFERENCE]))
        return found

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(each.kind for each in self.edits))

    def of_kind(self, kind: str) -> list[ChosenEdit]:
        return [each for each in self.edits if each.kind == kind]

    def mean(self, edits: Sequence[ChosenEdit], column: str, strength: Any = None) -> Interval:
        """Over the rows of edits, each at its chosen strength or all at one."""
        rows = [row for each in edits for row in each.rows(self.results, strength)]
        return mean_interval(row.get(column) for row in rows)

    def findings(self) -> list[dict[str, Any]]:
        """Every edit with its means, as plain values."""
        return [
            {
                "label": each.label,
                "edit": each.kind,
                "latents": list(each.features),
                "strength": each.strength,
                "trial": each.tried,
                **{name: self.mean([each], name).as_dict() for name in self.columns},
            }
            for each in self.edits
        ]

    def by_strength(self) -> list[dict[str, Any]]:
        """Means over all labels of each kind of edit at each strength, as plain values."""
        return [
            {
                "edit": kind,
                "strength": strength,
                **{n: self.mean(own, n, strength).as_dict() for n in self.columns},
            }
            for kind in self.kinds
            for own in [self.of_kind(kind)]
            for strength in self._strengths(own[0].condition)
        ]

    def sections(self) -> list[Section]:
        """Tables by kind and by label, and success against distance."""
        shown = self.columns[:8]
        pooled = [(kind, *self._cells(self.of_kind(kind), shown)) for kind in self.kinds]
        lines = [
            (
                *(each.label, each.kind, ", ".join(map(str, each.features)), f"{each.strength:g}"),
                "–" if each.tried is None else f"{each.tried:.2f}",
                *self._cells([each], shown),
            )
            for each in self.edits
        ]
        heads = ("label", "edit", "latents", "strength", "in the trial", *shown)
        lead = "Latents and strengths were chosen on other pictures. Means with 95 % intervals."
        found = [
            Section("Chosen latents, all labels", [Table(("edit", *shown), pooled)], lead),
            Section("Chosen latents by label", [Table(heads, lines)]),
        ]
        distances = [name for name in self.columns if name.endswith("_distance")]
        return [*found, *(self._against(name) for name in distances[:1])]

    def _against(self, distance: str) -> Section:
        """Success against the distance to the unedited picture, a point for each strength."""
        series, rows = [], []
        for number, kind in enumerate(self.kinds):
            own, points = self.of_kind(kind), []
            for strength in self._strengths(own[0].condition):
                far, success = (self.mean(own, n, strength) for n in (distance, SUCCESS))
                points.append((far.value, success))
                rows.append((kind, f"{strength:g}", *map(format_interval, (far, success))))
            series.append(Series.of_intervals(kind, sorted(points, key=lambda p: p[0]), number + 1))
        label = distance.replace("_", " ")
        heads = ("edit", "strength", label, SUCCESS)
        charts = Charts([Curves("success", series[:5], label)])
        return Section("Success against distance", [charts, Table(heads, rows)])

    def _strengths(self, condition: str) -> list[float]:
        return list(dict.fromkeys(row["strength"] for row in self.results.of(condition)))

    def _cells(self, edits: Sequence[ChosenEdit], columns: Sequence[str]) -> list[str]:
        return [format_interval(self.mean(edits, name)) for name in columns]


def _count(size: int) -> str:
    return "one latent" if size == 1 else f"up to {size} latents"


def _edit(label: str, kind: str, condition: str, name: str, note: Mapping[str, Any]) -> ChosenEdit:
    features, tried = tuple(note["features"]), note["succeeded"]
    if condition == "random_features":
        features, tried = (), None
    return ChosenEdit(label, kind, condition, name, note["strength"], features, tried)
