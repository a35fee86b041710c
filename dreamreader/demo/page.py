"""The demo's report: what was found first, then how, then what it rests on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dreamreader.demo.measure import Outcome
from dreamreader.report import (
    Charts,
    Curves,
    Facts,
    Folded,
    Gallery,
    HeatMap,
    Number,
    Numbers,
    Picture,
    Report,
    Section,
    Series,
    Table,
    Text,
)
from dreamreader.stats import Interval
from dreamreader.zoo import scenes

if TYPE_CHECKING:
    from dreamreader.demo.run import Result

KEYS = ("turned", "kept", "rest")
SHOWN = 8  # rows of the test set in a gallery


def build(result: "Result") -> Report:
    """The page of a result."""
    plan, best = result.plan, result.best
    return Report(
        title=f"One direction turns {plan.source} into {plan.target}",
        lead=(
            f"Prompts ask for a {plan.source} object. Inside the model a vector is added that was "
            f"fitted on {plan.fit} scenes, each drawn in {plan.source} and in {plan.target}. "
            f"A detector reads the pictures. Site, step window and strength were chosen on "
            f"{plan.choose + plan.refine} scenes; the numbers here come from {plan.test} others."
        ),
        opening=[_headline(result)],
        sections=[
            _pictures(result),
            _reading(result),
            _steering(result),
            _removal(result),
            _patching(result),
            _firing(result),
            _fingerprint(result),
        ],
        footer=[
            ("fingerprint", result.fingerprint.digest),
            ("edit", f"{best.place}, {best.window}, strength {best.strength:g}, text branch"),
            ("run", f"{result.pictures} pictures in {result.seconds:.0f} s"),
        ],
    )


def _headline(result: "Result") -> Numbers:
    plan, found = result.plan, result.confirmed.outcomes
    turned, kept = found["direction"].share("turned"), found["direction"].share("kept")
    random, none = found["random"].share("turned"), found["no edit"].share("turned")
    ceiling = found["prompt"].share("kept")
    return Numbers(
        [
            Number(
                _percent(turned),
                f"turned {plan.target}",
                _bounds(turned),
                _tone(turned.value >= 0.8),
            ),
            Number(
                _percent(kept),
                f"kept shape and place ({_percent(ceiling)} when the prompt says {plan.target})",
                _bounds(kept),
                _tone(kept.value >= 0.8),
            ),
            Number(
                _percent(random),
                f"{plan.target} with a random direction of the same norm",
                _bounds(random),
                _tone(random.value <= 0.15),
            ),
            Number(_percent(none), f"{plan.target} without an edit", _bounds(none)),
        ]
    )


def _pictures(result: "Result") -> Section:
    plan, confirmed = result.plan, result.confirmed
    count = min(SHOWN, plan.test)
    names = _names(plan.target)
    lines = [
        (label, _row(confirmed, name, count, plan.source, plan.target))
        for name, label in names.items()
    ]
    prompts = [
        (str(i + 1), row.prompt(plan.source)) for i, row in enumerate(confirmed.rows[:count])
    ]
    return Section(
        "Pictures",
        [
            Gallery(
                lines,
                [str(i + 1) for i in range(count)],
                f"The first {count} of {plan.test} held-out rows, not picked. A column has one "
                f"prompt and one seed. Below each picture: the colour that the detector reads.",
                cell=104,
            ),
            Folded("The prompts", [Facts(prompts)]),
            Table(
                ["", plan.target, "shape and place kept", "rest of the scene kept"],
                [
                    [label, *(confirmed.outcomes[name].share(key).percent() for key in KEYS)]
                    for name, label in names.items()
                ],
                f"All {plan.test} held-out rows, share of pictures (95 % interval)",
            ),
        ],
        lead=(
            "The same prompts and the same noise, with and without the edit; last, for comparison, "
            f"what the model draws when the prompt itself says {plan.target}."
        ),
    )


def _names(target: str) -> dict[str, str]:
    """What the page calls the conditions of the test."""
    return {
        "no edit": "no edit",
        "direction": "direction added",
        "random": "random direction",
        "prompt": f"prompt says {target}",
    }


def _row(confirmed: Any, name: str, count: int, source: str, target: str) -> list[Picture]:
    outcome, images = confirmed.outcomes[name], confirmed.images[name]
    pictures = []
    for i in range(count):
        color = target if outcome.turned[i] else source if outcome.source[i] else "other"
        change = "" if outcome.kept[i] else "; shape or place changed"
        alt = f"{name}: {confirmed.rows[i].prompt(source)}; the object is {color}{change}"
        pictures.append(Picture(images[i], alt, color + ("" if outcome.kept[i] else ", moved")))
    return pictures


def _reading(result: "Result") -> Section:
    """Share of variance that the colour explains, by site and step window."""
    plan, means = result.plan, result.means
    count = min(10, plan.steps)
    edges = [round(i * plan.steps / count) for i in range(count + 1)]
    windows = list(zip(edges, edges[1:], strict=False))
    shares = {site: means.explained(site) for site in means.sites}
    heat = HeatMap(
        "Share of the variance between pictures that the colour explains, percent",
        [[float(shares[site][a:b].mean()) for a, b in windows] for site in means.sites],
        [_short(site) for site in means.sites],
        [str(a) if b - a == 1 else f"{a}–{b - 1}" for a, b in windows],
        "site / steps",
        caption=(
            "“down 1.0” is unet.down_blocks.1.attentions.0: the output of the whole block, of its "
            "self-attention (attn1) and of its cross-attention (attn2)."
        ),
    )
    chance = (len(scenes.COLORS) - 1) / (len(scenes.COLORS) * plan.fit - 1)
    return Section(
        "Where the colour can be read",
        [heat],
        lead=(
            f"{plan.fit} scenes, each drawn in {len(scenes.COLORS)} colours with the same noise; "
            f"the mean over the tokens of the text branch was recorded at {len(means.sites)} sites "
            f"and all {plan.steps} steps. Colours that say nothing would explain "
            f"{100 * chance:.0f} %."
        ),
    )


def _short(site: str) -> str:
    """`down 1.0 attn2` for `unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2`."""
    name = site.removeprefix("unet.").replace(".transformer_blocks.0.", " ")
    name = name.replace("_blocks.", " ").replace("_block", "").replace(".attentions", "")
    return name if " attn" in name else name + " block"


def _steering(result: "Result") -> Section:
    plan, best = result.plan, result.best
    curve = result.confirmed.curve
    dose = Curves(
        f"Dose and response on {min(plan.curve, plan.test)} held-out rows",
        [
            _line(f"turned {plan.target}", curve["direction"], "turned", 1),
            _line("kept shape and place", curve["direction"], "kept", 4),
            _line(f"{plan.target}, random direction", curve["random"], "turned", 2),
        ],
        "strength (multiples of the mean difference)",
        "share of pictures, percent",
    )
    random = Curves(
        "What a random direction does to shape and place",
        [
            _line("kept, direction", curve["direction"], "kept", 4),
            _line("kept, random direction", curve["random"], "kept", 2),
        ],
        "strength (multiples of the mean difference)",
        "share of pictures, percent",
    )
    return Section(
        "Strength, site and step window",
        [
            Charts([dose, random]),
            Charts(_sweep_maps(result)),
            Text(
                f"In brackets: shape and place kept in less than {100 * plan.keep:.0f} %. The best "
                f"{len(result.finalists)} of these settings were drawn on {plan.refine} more rows. "
                f"Chosen: {best.place}, {best.window}, strength {best.strength:g}, whose smaller "
                f"share, of turned and of kept pictures, is the largest. Bands are 95 % Wilson "
                "intervals."
            ),
            Folded(
                f"The {len(result.finalists)} finalists",
                [
                    Table(
                        ["site", "steps", "strength", plan.target, "shape and place kept"],
                        [
                            [p.place, p.window, p.strength]
                            + [p.outcome.share(key).percent() for key in ("turned", "kept")]
                            for p in result.finalists
                        ],
                    )
                ],
            ),
        ],
        lead=(
            "The vector is the difference of the mean cross-attention outputs, one per site and "
            "step, and is added to the text branch only, so that guidance multiplies it."
        ),
    )


def _line(name: str, points: Sequence[tuple[float, Outcome]], key: str, tone: int) -> Series:
    shares = [outcome.share(key) for _, outcome in points]
    return Series(
        name,
        [strength for strength, _ in points],
        [share.value for share in shares],
        [share.low for share in shares],
        [share.high for share in shares],
        tone,
    )


def _sweep_maps(result: "Result") -> list[HeatMap]:
    """One heat map per step window: places by strengths, share of pictures that turned."""
    plan = result.plan
    maps = []
    for window in dict.fromkeys(point.window for point in result.points):
        cells = {(p.place, p.strength): p.outcome for p in result.points if p.window == window}
        names = [place.name for place in result.places]
        maps.append(
            HeatMap(
                f"Turned {plan.target}, percent of {plan.choose}: {window}",
                [[cells[n, s].share("turned").value for s in plan.strengths] for n in names],
                names,
                [f"{s:g}" for s in plan.strengths],
                "site / strength",
                notes=[
                    [
                        f"kept shape and place: {cells[n, s].share('kept').percent()}"
                        for s in plan.strengths
                    ]
                    for n in names
                ],
                bracketed=[
                    [cells[n, s].share("kept").value < plan.keep for s in plan.strengths]
                    for n in names
                ],
            )
        )
    return maps


def _removal(result: "Result") -> Section:
    plan, removal = result.plan, result.removal
    count = min(SHOWN, len(removal.rows))
    names = list(removal.outcomes)
    lines = [
        (
            name,
            [
                Picture(removal.images[name][i], f"{name}: {removal.rows[i].prompt(plan.source)}")
                for i in range(count)
            ],
        )
        for name in names
    ]
    table = Table(
        ["", f"still {plan.source}", "shape and place kept", "rest of the scene kept"],
        [
            [
                name,
                *(
                    removal.outcomes[name].share(key).percent()
                    for key in ("source", "kept", "rest")
                ),
            ]
            for name in names
        ],
        f"{len(removal.rows)} held-out rows, share of pictures (95 % interval)",
    )
    return Section(
        f"Taking {plan.source} out",
        [table, Gallery(lines, caption="Same prompts and noise in each column.", cell=104)],
        lead=(
            f"At every cross-attention the component along “{plan.source} less the mean of the "
            f"other colours” is projected out of the text branch, at all steps."
        ),
    )


def _patching(result: "Result") -> Section:
    plan, found = result.plan, result.patching
    heat = HeatMap(
        f"Share of the way from {plan.source} to {plan.target} that a patch restores, percent",
        [[cell.value for cell in line] for line in found.effect],
        found.places,
        found.windows,
        "site / steps",
        notes=[[cell.percent() for cell in line] for line in found.effect],
    )
    lines = [
        (
            name,
            [
                Picture(images[j], f"patched at {name}, steps {window}")
                for j, window in enumerate(found.windows)
            ],
        )
        for name, images in zip(found.places, found.patched, strict=True)
    ]
    ends = Gallery(
        [
            (
                "",
                [
                    Picture(found.clean[0], "the clean run"),
                    Picture(found.corrupted[0], "the corrupted run"),
                ],
            )
        ],
        [f"clean ({plan.target})", f"corrupted ({plan.source})"],
        cell=104,
    )
    return Section(
        "Where and when the colour enters",
        [
            heat,
            Folded(
                "Pictures of the first pair, and intervals",
                [
                    ends,
                    Gallery(lines, found.windows, "Rows: site. Columns: steps."),
                    _intervals(result),
                ],
            ),
        ],
        lead=(
            f"Cross-attention outputs of a run that says {plan.target} replace those of a run that "
            f"says {plan.source}, with the same noise, at one site and in one window of steps. "
            f"The effect is the object's mean colour on the way from {plan.source} (0) to "
            f"{plan.target} (100), over {found.rows} pairs."
        ),
    )


def _intervals(result: "Result") -> Table:
    found = result.patching
    rows = [
        [place, window, f"{100 * c.value:.0f}", f"{100 * c.low:.0f} to {100 * c.high:.0f}"]
        for place, line in zip(found.places, found.effect, strict=True)
        for window, c in zip(found.windows, line, strict=True)
    ]
    return Table(
        ["site", "steps", "restored, %", "95 % interval"], rows, "Bootstrap over pairs, 500 draws"
    )


def _firing(result: "Result") -> Section:
    summary, full, notes = [], [], []
    for title, report in result.fired:
        fired = [each for each in report if each.kind == "edit" and each.calls]
        summary.append([title, len({each.site for each in fired}), *_counts(fired)])
        full += [[title, each.site.removeprefix("unet."), *_counts([each])] for each in fired]
        notes += report.warnings
    counts = ["calls", "steps", "branch"]
    blocks: list[Any] = [Table(["run", "sites", *counts], summary)]
    if notes:
        blocks.append(Facts([("note", note) for note in dict.fromkeys(notes)]))
    blocks.append(Folded(f"All {len(full)} lines", [Table(["run", "site", *counts], full)]))
    return Section(
        "What fired",
        blocks,
        lead="Every edit at every site, counted while it ran; one that never fires is an error.",
    )


def _counts(fired: Sequence[Any]) -> list[Any]:
    """Calls, steps and branches of some lines of a firing report."""
    from dreamreader.engine import ranges

    steps = {step for each in fired for step in each.steps}
    branches = {name for each in fired for name in each.branches}
    return [sum(each.calls for each in fired), ranges(steps), ", ".join(sorted(branches))]


def _fingerprint(result: "Result") -> Section:
    mark = result.fingerprint
    packages = ", ".join(f"{name} {version}" for name, version in mark.packages.items())
    plan = mark.content["settings"]["plan"]
    return Section(
        "Fingerprint",
        [
            Facts(
                [
                    ("digest", mark.digest),
                    ("weights", mark.weights),
                    ("code", mark.code),
                    ("packages", packages),
                    ("seeds", f"{len(mark.seeds)}, from {min(mark.seeds)} to {max(mark.seeds)}"),
                ]
            ),
            Folded("Settings", [Facts([(k, v) for k, v in plan.items() if k != "type"])]),
            Folded("Machine (not part of the digest)", [Facts(list(mark.machine.items()))]),
        ],
        lead="Equal digests mean equal settings, weights, code, packages and seeds.",
    )


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.0f} %"


def _bounds(share: Interval) -> str:
    return f"{100 * share.low:.0f} to {100 * share.high:.0f} %, n = {share.n}"


def _tone(good: bool) -> str:
    return "good" if good else "poor"
