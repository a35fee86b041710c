"""The demo's report: what was found first, then how, then what it rests on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dreamreader.demo.result import CONDITIONS, DemoResult, settings, share
from dreamreader.demo.texts import read_texts
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

SHARES = {"kept": "shape and place kept", "rest": "rest of the scene kept"}
CELL = 104  # pixels of a picture


def build(result: DemoResult) -> Report:
    """The page of a result."""
    said, best = read_texts(result), result.best
    parts = {
        "pictures": _pictures,
        "reading": _reading,
        "steering": _steering,
        "removal": _removal,
        "patching": _patching,
    }
    where = f"{best.cell.name}, {best.cell.time}, strength {best.strength:g}, text branch"
    return Report(
        **said["page"],
        opening=[_headline(result, said["numbers"])],
        sections=[
            *(
                Section(said[name]["title"], make(result, said[name]), said[name]["lead"])
                for name, make in parts.items()
            ),
            *firing_sections([batch for each in result.runs for batch in each.folder.firing()]),
            _fingerprint(result),
        ],
        footer=[
            ("fingerprint", result.jobs["test"]["fingerprint"][:16]),
            ("edit", where),
            ("run", f"{result.pictures} pictures in {result.seconds:.0f} s"),
        ],
    )


def _headline(result: DemoResult, said: dict[str, str]) -> Numbers:
    edited, random, none = (result.test.of(name) for name in CONDITIONS[:3])
    turned, kept = share(edited, "turned"), share(edited, "kept")
    control, before = share(random, "turned"), share(none, "turned")
    judged = {
        "turned": (turned, "good" if turned.value >= 0.8 else "poor"),
        "kept": (kept, "good" if kept.value >= 0.8 else "poor"),
        "random": (control, "good" if control.value <= 0.15 else "poor"),
        "none": (before, ""),
    }
    return Numbers(
        [
            Number(
                f"{100 * each.value:.0f} %",
                said[name],
                f"{100 * each.low:.0f} to {100 * each.high:.0f} %, n = {each.n}",
                tone,
            )
            for name, (each, tone) in judged.items()
        ]
    )


def _pictures(result: DemoResult, said: dict[str, Any]) -> list[object]:
    test, seed = result.test, result.test.spec.seed_list[0]
    rows = {label: test.of(name) for name, label in said["conditions"].items()}
    first = {label: [r for r in each if r["seed"] == seed] for label, each in rows.items()}
    prompts = [row["prompt"] for row in first[said["conditions"]["unedited"]][:COLUMNS]]
    columns = [str(n + 1) for n in range(len(prompts))]
    return [
        Gallery(_lines(test, first), columns, said["caption"], CELL),
        Folded("The prompts", [Facts(list(zip(columns, prompts, strict=True)))]),
        _shares(rows, {"turned": result.plan.target, **SHARES}, said["shares"]),
    ]


def _reading(result: DemoResult, said: dict[str, Any]) -> list[object]:
    """Share of variance that the colour explains, by site and window of steps."""
    shares = {_short(site): result.means.explained(site) for site in result.means.sites}
    steps = len(next(iter(shares.values())))
    count = min(10, steps)
    edges = [round(n * steps / count) for n in range(count + 1)]
    windows = list(zip(edges, edges[1:], strict=False))
    values = [[float(each[a:b].mean()) for a, b in windows] for each in shares.values()]
    columns = [str(a) if b - a == 1 else f"{a}–{b - 1}" for a, b in windows]
    caption = said["caption"]
    return [HeatMap(said["map"], values, list(shares), columns, "site / steps", caption=caption)]


def _short(site: str) -> str:
    """`down 1.0 attn2` for `unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2`."""
    name = site.removeprefix("unet.").replace(".transformer_blocks.0.", " ")
    name = name.replace("_blocks.", " ").replace("_block", "").replace(".attentions", "")
    return name if " attn" in name else name + " block"


def _steering(result: DemoResult, said: dict[str, Any]) -> list[object]:
    target, axes = result.plan.target, (said["x"], said["y"])
    edited, random = (result.curve(name) for name in ("edited", "random_direction"))

    def curve(name: str, points: Sequence[tuple[float, Any]], key: str, tone: int) -> Series:
        return Series.of_intervals(name, [(x, share(rows, key)) for x, rows in points], tone)

    dose = [
        curve(f"turned {target}", edited, "turned", 1),
        curve("kept shape and place", edited, "kept", 4),
        curve(f"{target}, random direction", random, "turned", 2),
    ]
    kept = [
        curve("kept, direction", edited, "kept", 4),
        curve("kept, random direction", random, "kept", 2),
    ]
    finalists = {
        f"{each.cell.name}, {each.cell.time}, strength {each.strength:g}": each.rows
        for each in result.finalists
    }
    table = _shares(finalists, {"turned": target, "kept": SHARES["kept"]})
    return [
        Charts([Curves(said["dose"], dose, *axes), Curves(said["random"], kept, *axes)]),
        Charts(_sweep_maps(result)),
        Text(said["choice"]),
        Folded(f"The {len(finalists)} finalists", [table]),
    ]


def _sweep_maps(result: DemoResult) -> list[HeatMap]:
    """One heat map per step window: places by strengths, share of pictures that turned."""
    cells = {(e.cell.time, e.cell.name, e.strength): e.rows for e in settings(result.sweep)}
    windows, places, strengths = (list(dict.fromkeys(axis)) for axis in zip(*cells, strict=True))
    maps = []
    for window in windows:
        rows = [[cells[window, place, at] for at in strengths] for place in places]
        kept = [[share(each, "kept") for each in line] for line in rows]
        maps.append(
            HeatMap(
                f"Turned {result.plan.target}, percent of {len(rows[0][0])}: {window}",
                [[share(each, "turned").value for each in line] for line in rows],
                places,
                [f"{each:g}" for each in strengths],
                "site / strength",
                notes=[[f"{SHARES['kept']}: {e.percent()}" for e in line] for line in kept],
                bracketed=[[e.value < result.plan.keep for e in line] for line in kept],
            )
        )
    return maps


def _removal(result: DemoResult, said: dict[str, Any]) -> list[object]:
    found = result.removed()
    return [
        _shares(found, {"source": f"still {result.plan.source}", **SHARES}, said["shares"]),
        Gallery(_lines(result.removal, found), caption=said["caption"], cell=CELL),
    ]


def _patching(result: DemoResult, said: dict[str, Any]) -> list[object]:
    plan, results, grid = result.plan, result.patching, result.grid
    heat = grid.heat_map(said["map"], alpha=1)  # a few pairs bring no cell below a bound
    places = list(dict.fromkeys(cell.name for cell in grid.cells))
    drawn = [row for row in results.of("patched") if row["item"] == results.rows[0]["item"]]
    lines = {name: [r for r in drawn if results.cell(r).name == name] for name in places}
    ends = {"": [results.of(name)[0] for name in ("clean", "corrupted")]}
    headings = [f"clean ({plan.target})", f"corrupted ({plan.source})"]
    pictures = [
        Gallery(_lines(results, ends), headings, cell=CELL),
        Gallery(_lines(results, lines), heat.columns, said["caption"]),
    ]
    (section,) = grid_sections({"patched": grid}, "tint")
    return [
        replace(heat, rows=places, caption=""),
        Folded("Pictures of the first pair", pictures),
        *section.blocks[1:],
    ]


def _fingerprint(result: DemoResult) -> Section:
    folder = result.test.folder
    own = fingerprint_section(folder.path, folder.need_fingerprint())
    jobs = [(name, each["rows"], each["fingerprint"][:16]) for name, each in result.jobs.items()]
    every = Table(["folder", "pictures", "fingerprint"], jobs)
    lead = "Of the held-out test, which rests on the files and the choice of the jobs before it. "
    return Section(own.title, [every, *own.blocks], lead + own.lead)


def _shares(rows: Mapping[str, Sequence[Found]], keys: dict[str, str], caption: str = "") -> Table:
    """A table of shares: a line for each set of rows, a column for each key of `share`."""
    lines = [[label, *(share(each, k).percent() for k in keys)] for label, each in rows.items()]
    return Table(["", *keys.values()], lines, caption)


def _lines(
    results: Results, rows: Mapping[str, Sequence[Found]]
) -> list[tuple[str, list[Picture]]]:
    """A line of pictures for each set of rows; below them what the detector reads."""
    return [
        (label, [_picture(results, row) for row in each[:COLUMNS]]) for label, each in rows.items()
    ]


def _picture(results: Results, row: Found) -> Picture:
    mark = ""
    if "shape_kept" in row:
        moved = "" if row["shape_kept"] and row["place_kept"] else ", moved"
        mark = (row["color"] or "none") + moved
    where = f", {row['cell']}" if row["cell"] else ""
    said = f"; the object is {mark}" if mark else ""
    alt = f"{row['condition'].replace('_', ' ')}{where}: {row['prompt']}{said}"
    return Picture(results.image(row), alt, mark)
