"""Everything that the demo found, as values, as lines for the terminal, and as plain numbers."""

from dataclasses import dataclass
from typing import Any

from dreamreader.demo import directions, patch, remove, steer
from dreamreader.demo.plan import DemoPlan
from dreamreader.jobs import Fingerprint
from dreamreader.steering import LabelMeans


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo found; `page.build` makes the report of it."""

    plan: DemoPlan
    places: list[directions.SiteGroup]
    means: LabelMeans
    points: list[steer.Point]
    finalists: list[steer.Point]
    best: steer.Point
    confirmed: steer.Confirmation
    removal: remove.Removal
    patching: patch.PatchOutcome
    fired: list[tuple[str, Any]]
    fingerprint: Fingerprint
    pictures: int
    seconds: float

    @property
    def best_place(self) -> directions.SiteGroup:
        return next(place for place in self.places if place.name == self.best.place)

    def summary(self) -> str:
        """The result in four lines."""
        plan, found = self.plan, self.confirmed.outcomes
        lines = [
            f"{plan.source} to {plan.target} on {plan.test} held-out rows, at {self.best.place}, "
            f"{self.best.window}, strength {self.best.strength:g} (95 % intervals):"
        ]
        for name in ("direction", "random", "no edit", "prompt"):
            turned, kept = (found[name].share(key).percent() for key in ("turned", "kept"))
            lines.append(f"  {name:<10} {plan.target} in {turned}; shape and place kept in {kept}")
        return "\n".join([*lines, f"{self.pictures} pictures in {self.seconds:.0f} s"])

    def as_dict(self) -> dict[str, Any]:
        """All numbers as plain values, for results.json."""
        best = self.best
        return {
            "fingerprint": self.fingerprint.as_dict(),
            "chosen": {"place": best.place, "window": best.window, "strength": best.strength},
            "test": {name: found.as_dict() for name, found in self.confirmed.outcomes.items()},
            "curve": {
                name: [{"strength": s, **found.as_dict()} for s, found in line]
                for name, line in self.confirmed.curve.items()
            },
            "explained": {site: self.means.explained(site).tolist() for site in self.means.sites},
            "sweep": [_point(point) for point in self.points],
            "finalists": [_point(point) for point in self.finalists],
            "removal": {name: found.as_dict() for name, found in self.removal.outcomes.items()},
            "patching": [
                {"place": place, "window": window, "effect": cell.as_dict()}
                for place, line in zip(self.patching.places, self.patching.effect, strict=True)
                for window, cell in zip(self.patching.windows, line, strict=True)
            ],
            "pictures": self.pictures,
        }


def _point(point: steer.Point) -> dict[str, Any]:
    place = {"place": point.place, "window": point.window, "strength": point.strength}
    return place | point.outcome.as_dict()
