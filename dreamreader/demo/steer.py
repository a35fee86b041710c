"""Steering: a sweep over site, window and strength, the choice, and its test on other rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from dreamreader.demo.bench import Bench
from dreamreader.demo.data import SceneRow
from dreamreader.demo.directions import SiteGroup, controls
from dreamreader.demo.measure import Outcome, judge
from dreamreader.demo.plan import WINDOWS
from dreamreader.edits import Steer
from dreamreader.zoo.detector import Reading, detect

Directions = Mapping[str, Mapping[str, Tensor]]  # place -> site -> [steps, features]


@dataclass(frozen=True)
class Point:
    """One setting of the sweep with what it did."""

    place: str
    window: str
    strength: float
    outcome: Outcome


@dataclass(frozen=True)
class Confirmation:
    """The chosen setting on rows that had no part in the choice.

    Attributes:
        rows: prompts and seeds.
        images: pictures by condition: "no edit", "direction", "random", and "prompt", where the
            prompt itself says the target colour: what an edit can reach at best.
        outcomes: what the detector read, by the same names.
        curve: by "direction" and "random", (strength, outcome) over the first
            `DemoPlan.curve` rows.
    """

    rows: Sequence[SceneRow]
    images: Mapping[str, Float[Tensor, "n 3 h w"]]
    outcomes: Mapping[str, Outcome]
    curve: Mapping[str, Sequence[tuple[float, Outcome]]]


def sweep(
    bench: Bench, rows: Sequence[SceneRow], places: Sequence[SiteGroup], directions: Directions
) -> list[Point]:
    """Steers at every place, in every window, with every strength.

    All strengths and windows of a place are rows of one run: each window is one edit, whose
    strength is 0 in the rows of the other windows.
    """
    plan = bench.plan
    unedited = read_unedited(bench, rows)
    settings = [(window, strength) for window in WINDOWS for strength in plan.strengths]
    points = []
    for place in places:
        edits = [
            steer(bench, place, directions[place.name], window, _only(window, settings, len(rows)))
            for window in WINDOWS
        ]
        images = _draw(bench, list(rows) * len(settings), edits, f"steer {place.name}")
        for i, (window, strength) in enumerate(settings):
            part = images[i * len(rows) : (i + 1) * len(rows)]
            outcome = judge(part, unedited, plan.source, plan.target)
            points.append(Point(place.name, window, strength, outcome))
    return points


def refine(
    bench: Bench,
    rows: Sequence[SceneRow],
    places: Sequence[SiteGroup],
    directions: Directions,
    points: Sequence[Point],
) -> list[Point]:
    """The finalists of the sweep, with the outcome on further rows added to theirs.

    A few rows tell good settings from bad ones, but not good ones from each other.
    """
    plan = bench.plan
    by_name = {place.name: place for place in places}
    unedited = read_unedited(bench, rows)
    found = []
    for point in sorted(points, key=_rank, reverse=True)[: plan.finalists]:
        place = by_name[point.place]
        alphas = [point.strength] * len(rows)
        edit = steer(bench, place, directions[point.place], point.window, alphas)
        images = _draw(bench, rows, [edit], "refine")
        more = judge(images, unedited, plan.source, plan.target)
        found.append(replace(point, outcome=point.outcome + more))
    return found


def choose(points: Sequence[Point]) -> Point:
    """The point whose smaller share, of turned and of kept pictures, is the largest.

    A setting is as good as the worse of the two things it has to do. Ties go to the larger sum,
    then to the weaker edit.

    Args:
        points: candidates.
    """
    return max(points, key=_rank)


def _rank(point: Point) -> tuple[float, float, float]:
    turned, kept = (point.outcome.share(name).value for name in ("turned", "kept"))
    return min(turned, kept), turned + kept, -point.strength


def confirm(
    bench: Bench,
    rows: Sequence[SceneRow],
    place: SiteGroup,
    best: Point,
    directions: Mapping[str, Tensor],
) -> Confirmation:
    """Measures the chosen setting and its controls on new rows, and the dose-response on some."""
    plan = bench.plan
    random = controls(dict(directions), plan.seed + 1)
    clean = _draw(bench, rows, [])
    unedited = detect(clean)
    images, outcomes, curve = {"no edit": clean}, {}, {}
    outcomes["no edit"] = judge(clean, unedited, plan.source, plan.target)
    images["prompt"] = _draw(bench, rows, [], color=plan.target)
    outcomes["prompt"] = judge(images["prompt"], unedited, plan.source, plan.target)
    few = list(rows[: plan.curve])
    for name, vectors in (("direction", directions), ("random", random)):
        others = [s for s in plan.strengths if s != best.strength]
        alphas = [best.strength] * len(rows) + [s for s in others for _ in few]
        edit = steer(bench, place, vectors, best.window, alphas)
        drawn = _draw(bench, [*rows, *few * len(others)], [edit], f"test, {name}")
        images[name] = drawn[: len(rows)]
        outcomes[name] = judge(images[name], unedited, plan.source, plan.target)
        found = {best.strength: images[name][: len(few)], 0.0: clean[: len(few)]}
        for i, strength in enumerate(others):
            start = len(rows) + i * len(few)
            found[strength] = drawn[start : start + len(few)]
        curve[name] = [
            (s, judge(found[s], unedited[: len(few)], plan.source, plan.target))
            for s in sorted(found)
        ]
    return Confirmation(rows, images, outcomes, curve)


def steer(
    bench: Bench,
    place: SiteGroup,
    directions: Mapping[str, Tensor],
    window: str,
    alphas: Sequence[float],
) -> Steer:
    """The edit: at each site its own direction of the running step, in the text branch only.

    Only the text branch is changed, because guidance then multiplies the change by its scale.
    """
    return Steer(
        tuple(place.sites),
        dict(directions),
        alpha=list(alphas),
        steps=bench.plan.window(window),
        branch="cond",
    )


def read_unedited(bench: Bench, rows: Sequence[SceneRow]) -> list[Reading]:
    return detect(_draw(bench, rows, []))


def _draw(
    bench: Bench,
    rows: Sequence[SceneRow],
    edits: Sequence[Steer],
    title: str = "",
    color: str | None = None,
) -> Tensor:
    prompts = [row.prompt(color or bench.plan.source) for row in rows]
    return bench.draw(prompts, [row.seed for row in rows], edits, title)


def _only(window: str, settings: Sequence[tuple[str, float]], rows: int) -> list[float]:
    """The strength of every row of the sweep for the edit of one window."""
    return [strength if name == window else 0.0 for name, strength in settings for _ in range(rows)]
