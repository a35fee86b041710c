"""Everything that the demo found, as values, as lines for the terminal, and as plain numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dreamreader.demo.plan import DemoPlan
from dreamreader.experiments import Results
from dreamreader.experiments.pages.chunked import effects
from dreamreader.experiments.results import Found
from dreamreader.stats import Interval, wilson
from dreamreader.steering import LabelMeans
from dreamreader.sweep import Cell, Grid

CONDITIONS = ("edited", "random_direction", "unedited", "target_prompt")  # of the test
_TRUTH = {
    "turned": lambda row: row["turned"],
    "source": lambda row: row["color"] == row["source"],
    "kept": lambda row: row["shape_kept"] and row["place_kept"],
    "rest": lambda row: row["rest_kept"],
}
"""`turned`: the main object has the target colour; `source`: the source colour; `kept`: its shape
and place are those of the unedited picture; `rest`: size, background, frame and object count."""


def share(rows: Iterable[Found], key: str) -> Interval:
    """Share of pictures of which a key of `_TRUTH` holds; without any object none does."""
    return wilson([bool(_TRUTH[key](row)) for row in rows])


def shares(rows: Sequence[Found]) -> dict[str, dict[str, float | int]]:
    """All shares as plain values."""
    return {key: share(rows, key).as_dict() for key in _TRUTH}


@dataclass(frozen=True)
class Setting:
    """A cell and a strength, with the rows that were drawn there."""

    cell: Cell
    strength: float
    rows: Sequence[Found]

    @property
    def rank(self) -> tuple[float, float, float]:
        """A setting is as good as the worse of what it has to do: to turn the colour, and to keep
        shape and place. Ties go to the larger sum, then to the weaker edit."""
        turned, kept = (share(self.rows, key).value for key in ("turned", "kept"))
        return min(turned, kept), turned + kept, -self.strength

    def as_dict(self) -> dict[str, Any]:
        where = {"place": self.cell.name, "steps": self.cell.time, "strength": self.strength}
        return where | shares(self.rows)


def settings(results: Results) -> list[Setting]:
    """All settings of a sweep."""
    found: dict[tuple[str, float], list[Found]] = {}
    for row in results.of("edited"):
        found.setdefault((row["cell_json"], row["strength"]), []).append(row)
    return [Setting(results.cell(rows[0]), at, rows) for (_, at), rows in found.items()]


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo found; `page.build` makes the report of it.

    Attributes:
        means: of all colours, from the recordings.
        sweep, refined, test, dose, removal, patching: results of the jobs of these names.
        finalists: the best settings of the sweep, with their rows of `refine` too. best: of these.
        jobs: folder and fingerprint of every job, by name.
    """

    plan: DemoPlan
    means: LabelMeans
    sweep: Results
    refined: Results
    finalists: Sequence[Setting]
    best: Setting
    test: Results
    dose: Results
    removal: Results
    patching: Results
    jobs: dict[str, Any]
    seconds: float

    @property
    def runs(self) -> list[Results]:
        """The results of all jobs that draw."""
        return [self.sweep, self.refined, self.test, self.dose, self.removal, self.patching]

    @property
    def grid(self) -> Grid:
        """What patching restored at every place and window."""
        return effects(self.patching, "patched")

    def curve(self, condition: str) -> list[tuple[float, list[Found]]]:
        """Strengths with their rows, on the same prompts and seeds."""
        few = {(row["prompt"], row["seed"]) for row in self.dose.of("unedited")}
        every = [*self.test.rows, *self.dose.rows]
        found: dict[float, list[Found]] = {}
        for row in every:
            if (row["prompt"], row["seed"]) in few and row["condition"] == condition:
                found.setdefault(row["strength"], []).append(row)
        return sorted({0.0: self.dose.of("unedited"), **found}.items())

    def summary(self) -> str:
        """The result in a few lines."""
        plan, cell = self.plan, self.best.cell
        lines = [
            f"{plan.source} to {plan.target} on {len(self.test.of('edited'))} held-out rows, at "
            f"{cell.name}, {cell.time}, strength {self.best.strength:g} (95 % intervals):"
        ]
        for name in CONDITIONS:
            turned, kept = (share(self.test.of(name), key).percent() for key in ("turned", "kept"))
            label = name.replace("_", " ")
            lines.append(f"  {label:<16} {plan.target} in {turned}; shape and place kept in {kept}")
        return "\n".join([*lines, f"{self.pictures} pictures in {self.seconds:.0f} s"])

    @property
    def pictures(self) -> int:
        """Rows of all jobs."""
        return sum(each["rows"] for each in self.jobs.values())

    def as_dict(self) -> dict[str, Any]:
        """All numbers as plain values, for results.json."""
        grid = self.grid
        return {
            "jobs": self.jobs,
            "chosen": self.best.as_dict(),
            "test": {name: shares(self.test.of(name)) for name in CONDITIONS},
            "curve": {
                name: [{"strength": at, **shares(rows)} for at, rows in self.curve(name)]
                for name in ("edited", "random_direction")
            },
            "explained": {site: self.means.explained(site).tolist() for site in self.means.sites},
            "sweep": [each.as_dict() for each in settings(self.sweep)],
            "finalists": [each.as_dict() for each in self.finalists],
            "removal": {name: shares(rows) for name, rows in self.removed().items()},
            "patching": [
                {"place": cell.name, "steps": cell.time, "effect": effect.as_dict()}
                for cell, effect in zip(grid.cells, grid.effects, strict=True)
            ],
            "pictures": self.pictures,
        }

    def removed(self) -> dict[str, list[Found]]:
        """Rows of the removal by what was done."""
        return {
            "no edit": self.removal.of("unedited"),
            "projected out": self.removal.of("edited", colour=1),
            "random projected out": self.removal.of("edited", random=1),
        }
