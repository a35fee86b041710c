"""The demo's report: what was found first, then how, then what it rests on."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dreamreader.demo.result import CONDITIONS, DemoResult, settings, share
from dreamreader.experiments import Results
from dreamreader.experiments.page import firing_sections
from dreamreader.experiments.pages.base import COLUMNS
from dreamreader.experiments.pages.grids import grid_sections
from dreamreader.experiments.results import Found
from dreamreader.jobs.page import fingerprint_section
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


def build(result: DemoResult) -> Report:
    """The page of a result."""
    plan, best = result.plan, result.best
    return Report(
        title=f"One direction turns {plan.source} into {plan.target}",
        lead=(
            f"Prompts ask for a {plan.source} object. Inside the model a vector is added that was "
            f"fitted on {_fitted(result)} pictures of each colour. A detector reads the pictures. "
            f"Site, step window and strength were chosen on {len(best.rows)} pictures; the numbers "
            f"here come from {len(result.test.of('edited'))} others."
        ),
        opening=[_headline(result)],
        sections=[
            _pictures(result),
            _reading(result),
            _steering(result),
            _removal(result),
            _patching(result),
            *_firing(result),
            _fingerprint(result),
        ],
        footer=[
            ("fingerprint", result.jobs["test"]["fingerprint"][:16]),
            (
                "edit",
                f"{best.cell.name}, {best.cell.time}, strength {best.strength:g}, text branch",
            ),
            ("run", f"{result.pictures} pictures in {result.seconds:.0f} s"),
        ],
    )


def _headline(result: DemoResult) -> Numbers:
    target = result.plan.target
    turned, random, none, _ = (share(result.test.of(each), "turned") for each in CONDITIONS)
    kept, *_, ceiling = (share(result.test.of(each), "kept") for each in CONDITIONS)
    said = f"kept shape and place ({_percent(ceiling)} when the prompt says {target})"
    control = f"{target} with a random direction of the same norm"
    return Numbers(
        [
            _number(turned, f"turned {target}", turned.value >= 0.8),
            _number(kept, said, kept.value >= 0.8),
            _number(random, control, random.value <= 0.15),
            Number(_percent(none), f"{target} without an edit", _bounds(none)),
        ]
    )


def _pictures(result: DemoResult) -> Section:
    target, test = result.plan.target, result.test
    names = {
        "unedited": "no edit",
        "edited": "direction added",
        "random_direction": "random direction",
        "target_prompt": f"prompt says {target}",
    }
    rows = {name: _first(test, test.of(name)) for name in names}
    lines = [(label, _line_of(test, rows[name], result)) for name, label in names.items()]
    count = len(rows["unedited"])
    prompts = [(str(n + 1), row["prompt"]) for n, row in enumerate(rows["unedited"])]
    keys = ("turned", "kept", "rest")
    table = Table(
        ["", target, "shape and place kept", "rest of the scene kept"],
        [[label, *_shares(test.of(name), keys)] for name, label in names.items()],
        f"All {len(test.of('edited'))} held-out rows, share of pictures (95 % interval)",
    )
    caption = (
        f"The first {count} of {len(test.of('edited'))} held-out rows with the first seed, not "
        "picked. A column has one prompt and one seed. Below each picture: the colour that the "
        "detector reads."
    )
    return Section(
        "Pictures",
        [
            Gallery(lines, [str(n + 1) for n in range(count)], caption, cell=104),
            Folded("The prompts", [Facts(prompts)]),
            table,
        ],
        lead=(
            "The same prompts and the same noise, with and without the edit; last, for comparison, "
            f"what the model draws when the prompt itself says {target}."
        ),
    )


def _reading(result: DemoResult) -> Section:
    """Share of variance that the colour explains, by site and step window."""
    means, colors = result.means, len(scenes.COLORS)
    shares = {site: means.explained(site) for site in means.sites}
    steps = len(next(iter(shares.values())))
    count = min(10, steps)
    edges = [round(n * steps / count) for n in range(count + 1)]
    windows = list(zip(edges, edges[1:], strict=False))
    heat = HeatMap(
        "Share of the variance between pictures that the colour explains, percent",
        [[float(each[a:b].mean()) for a, b in windows] for each in shares.values()],
        [_short(site) for site in shares],
        [str(a) if b - a == 1 else f"{a}–{b - 1}" for a, b in windows],
        "site / steps",
        caption=(
            "“down 1.0” is unet.down_blocks.1.attentions.0: the output of the whole block, of its "
            "self-attention (attn1) and of its cross-attention (attn2)."
        ),
    )
    chance = (colors - 1) / (result.jobs["record"]["rows"] - 1)
    return Section(
        "Where the colour can be read",
        [heat],
        lead=(
            f"{_fitted(result)} scenes and seeds, each drawn in {colors} colours with the same "
            f"noise; the mean over the tokens of the text branch was recorded at {len(shares)} "
            f"sites and all {steps} steps. Colours that say nothing would explain "
            f"{100 * chance:.0f} %."
        ),
    )


def _short(site: str) -> str:
    """`down 1.0 attn2` for `unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2`."""
    name = site.removeprefix("unet.").replace(".transformer_blocks.0.", " ")
    name = name.replace("_blocks.", " ").replace("_block", "").replace(".attentions", "")
    return name if " attn" in name else name + " block"


def _steering(result: DemoResult) -> Section:
    plan, best, more = result.plan, result.best, result.finalists
    edited, random = (result.curve(name) for name in ("edited", "random_direction"))
    axes = ("strength (multiples of the mean difference)", "share of pictures, percent")
    dose = [
        _curve(f"turned {plan.target}", edited, "turned", 1),
        _curve("kept shape and place", edited, "kept", 4),
        _curve(f"{plan.target}, random direction", random, "turned", 2),
    ]
    kept = [
        _curve("kept, direction", edited, "kept", 4),
        _curve("kept, random direction", random, "kept", 2),
    ]
    few = len(result.dose.of("unedited"))
    table = Table(
        ["site", "steps", "strength", plan.target, "shape and place kept"],
        [
            [each.cell.name, each.cell.time, each.strength, *_shares(each.rows, ("turned", "kept"))]
            for each in more
        ],
    )
    return Section(
        "Strength, site and step window",
        [
            Charts(
                [
                    Curves(f"Dose and response on {few} held-out rows", dose, *axes),
                    Curves("What a random direction does to shape and place", kept, *axes),
                ]
            ),
            Charts(_sweep_maps(result)),
            Text(
                f"In brackets: shape and place kept in less than {100 * plan.keep:.0f} %. The best "
                f"{len(more)} of these settings were drawn on more scenes, {len(best.rows)} "
                f"pictures of each in all. Chosen: {best.cell.name}, {best.cell.time}, strength "
                f"{best.strength:g}, whose smaller share, of turned and of kept pictures, is the "
                "largest. Bands are 95 % Wilson intervals."
            ),
            Folded(f"The {len(more)} finalists", [table]),
        ],
        lead=(
            "The vector is the difference of the mean cross-attention outputs, one per site and "
            "step, and is added to the text branch only, so that guidance multiplies it."
        ),
    )


def _curve(name: str, points: Sequence[tuple[float, Any]], key: str, tone: int) -> Series:
    return Series.of_intervals(name, [(x, share(rows, key)) for x, rows in points], tone)


def _sweep_maps(result: DemoResult) -> list[HeatMap]:
    """One heat map per step window: places by strengths, share of pictures that turned."""
    cells = {(e.cell.time, e.cell.name, e.strength): e.rows for e in settings(result.sweep)}
    windows, places, strengths = (list(dict.fromkeys(axis)) for axis in zip(*cells, strict=True))
    shown = [f"{each:g}" for each in strengths]
    maps = []
    for window in windows:
        rows = [[cells[window, place, at] for at in strengths] for place in places]
        turned, kept = (
            [[share(c, key) for c in line] for line in rows] for key in ("turned", "kept")
        )
        maps.append(
            HeatMap(
                f"Turned {result.plan.target}, percent of {len(rows[0][0])}: {window}",
                [[each.value for each in line] for line in turned],
                places,
                shown,
                "site / strength",
                notes=[[f"kept shape and place: {e.percent()}" for e in line] for line in kept],
                bracketed=[[e.value < result.plan.keep for e in line] for line in kept],
            )
        )
    return maps


def _removal(result: DemoResult) -> Section:
    source, found = result.plan.source, result.removed()
    keys = ("source", "kept", "rest")
    table = Table(
        ["", f"still {source}", "shape and place kept", "rest of the scene kept"],
        [[name, *_shares(rows, keys)] for name, rows in found.items()],
        f"{len(found['no edit'])} held-out rows, share of pictures (95 % interval)",
    )
    lines = [
        (name, _line_of(result.removal, rows[:COLUMNS], result)) for name, rows in found.items()
    ]
    return Section(
        f"Taking {source} out",
        [table, Gallery(lines, caption="Same prompts and noise in each column.", cell=104)],
        lead=(
            f"At every cross-attention the component along “{source} less the mean of the other "
            "colours” is projected out of the text branch, at all steps."
        ),
    )


def _patching(result: DemoResult) -> Section:
    plan, results, grid = result.plan, result.patching, result.grid
    title = f"Share of the way from {plan.source} to {plan.target} that a patch restores, percent"
    heat = grid.heat_map(title, alpha=1)  # a few pairs bring no cell below a bound
    places = list(dict.fromkeys(cell.name for cell in grid.cells))
    heat = replace(heat, rows=places, caption="")
    drawn = [row for row in results.of("patched") if row["item"] == results.rows[0]["item"]]
    lines = [
        (name, [_picture(results, row) for row in drawn if results.cell(row).name == name])
        for name in places
    ]
    ends = [_picture(results, results.of(name)[0]) for name in ("clean", "corrupted")]
    every = grid_sections({"patched": grid}, "tint")[0].blocks[1]
    columns = list(dict.fromkeys(row["cell_steps"] for row in drawn))
    pictures = [
        Gallery([("", ends)], [f"clean ({plan.target})", f"corrupted ({plan.source})"], cell=104),
        Gallery(lines, columns, "Rows: site. Columns: steps."),
    ]
    return Section(
        "Where and when the colour enters",
        [heat, Folded("Pictures of the first pair", pictures), every],
        lead=(
            f"Cross-attention outputs of a run that says {plan.target} replace those of a run that "
            f"says {plan.source}, with the same noise, at one site and in one window of steps. "
            f"The effect is the object's mean colour on the way from {plan.source} (0) to "
            f"{plan.target} (100), over {len(grid.rows)} pairs."
        ),
    )


def _firing(result: DemoResult) -> list[Section]:
    runs = (result.sweep, result.refined, result.test, result.dose, result.removal, result.patching)
    return firing_sections([batch for each in runs for batch in each.folder.firing()])


def _fingerprint(result: DemoResult) -> Section:
    folder = result.test.folder
    own = fingerprint_section(folder.path, folder.need_fingerprint())
    jobs = [(name, each["rows"], each["fingerprint"][:16]) for name, each in result.jobs.items()]
    every = Table(["folder", "pictures", "fingerprint"], jobs)
    lead = "Of the held-out test, which rests on the files and the choice of the jobs before it. "
    return Section(own.title, [every, *own.blocks], lead + own.lead)


def _fitted(result: DemoResult) -> int:
    """Pictures of one colour that were recorded."""
    return result.jobs["record"]["rows"] // len(scenes.COLORS)


def _first(results: Results, rows: Sequence[Found]) -> list[Found]:
    """The rows of the first seed, as many as a gallery has."""
    seed = results.spec.seed_list[0]
    return [row for row in rows if row["seed"] == seed][:COLUMNS]


def _line_of(results: Results, rows: Sequence[Found], result: DemoResult) -> list[Picture]:
    """Pictures with what the detector reads below: source, target or another colour."""
    found = []
    for row in rows:
        read = row["color"] if row["color"] in (result.plan.source, result.plan.target) else "other"
        moved = "" if row["shape_kept"] and row["place_kept"] else ", moved"
        found.append(_picture(results, row, read + moved))
    return found


def _picture(results: Results, row: Found, caption: str = "") -> Picture:
    where = f", {row['cell']}" if row["cell"] else ""
    said = f"; the object is {caption}" if caption else ""
    alt = f"{row['condition'].replace('_', ' ')}{where}: {row['prompt']}{said}"
    return Picture(results.image(row), alt, caption)


def _shares(rows: Sequence[Found], keys: Sequence[str]) -> list[str]:
    return [share(rows, key).percent() for key in keys]


def _number(found: Interval, label: str, good: bool) -> Number:
    return Number(_percent(found), label, _bounds(found), "good" if good else "poor")


def _percent(found: Interval) -> str:
    return f"{100 * found.value:.0f} %"


def _bounds(found: Interval) -> str:
    return f"{100 * found.low:.0f} to {100 * found.high:.0f} %, n = {found.n}"
