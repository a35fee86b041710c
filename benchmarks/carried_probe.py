"""A probe of one model that reads another through a map back, beside a probe of the other's own.

    python benchmarks/carried_probe.py [--captions 160] [--output FILE] [--write]

A linear probe tells the colour of a caption's object from the activations of shapes-unet at a
site, averaged over tokens, each step a row. It reads those of shapes-unet-b on its own trajectory
through maps back, which are fitted to other captions than those that are read. Below stand the
subject's own probe, the same with shuffled labels, and the source's probe on activations that are
cut or padded.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from paired import RESULTS, environment, write
from torch import Tensor

import dreamreader
from dreamreader import probes
from dreamreader.mapping import AffineMap, PairedRows, fit_map, score_map
from dreamreader.probes.scores import auroc, interval
from dreamreader.recording import record_between
from dreamreader.specs.data import scene_items
from dreamreader.specs.parts import Scenes
from dreamreader.stats import Interval
from dreamreader.zoo import settings

SITES = (
    "unet.up_blocks.2.attentions.1.transformer_blocks.0.attn2",
    "unet.up_blocks.2",
)
MAPS = ("ridge", "procrustes")
PAGE = Path(__file__).parents[1] / "docs" / "mapping.md"
START, END = "<!-- probe -->", "<!-- /probe -->"


def main() -> int:
    options = parse()
    items = list(scene_items(Scenes(count=options.captions, seed=3)))
    colours = [str(each.columns["source_color"]) for each in items]
    captions = [each.prompt for each in items]
    found = {site: measure(record(options, captions, site), colours) for site in SITES}
    file = options.output or RESULTS / "carried-probe-cpu.json"
    counts = {"captions": options.captions, "steps": options.steps, "colours": len(set(colours))}
    result = {"benchmark": "carried-probe", "environment": environment(), **counts, "sites": found}
    print(write(result, file))
    print(table(result))
    if options.write:
        text = PAGE.read_text()
        head, tail = text.split(START)[0], text.split(END)[1]
        result = json.loads(Path(file).read_text())
        PAGE.write_text(f"{head}{START}\n\n{table(result)}\n{END}{tail}")
    return 0


def record(options: argparse.Namespace, captions: list[str], site: str) -> PairedRows:
    """Both models on their own trajectories."""
    one, two = dreamreader.load("shapes-unet"), dreamreader.load("shapes-unet-b")
    seeds = range(300_000, 300_000 + len(captions))
    own: dict[str, Any] = settings(num_inference_steps=options.steps)
    pairs = record_between(one, two, captions, site, site, seeds=seeds, progress=False, **own)
    return PairedRows.of(pairs, site, site)


def measure(rows: PairedRows, colours: list[str]) -> dict[str, Any]:
    """Accuracy and AUROC on held-out captions, and the FVU of each map back."""
    train, held = rows.split(0.3)
    source = fit(train.x, train.groups, colours)
    own = fit(train.y, train.groups, colours)
    shuffled = fit(train.y, train.groups, shuffle(colours, train.groups))
    back, unmapped = train.reversed(), fit_map(train.reversed(), "identity")
    maps = {method: fit_map(back, method) for method in MAPS}
    arms = {
        "source, at home": (source, held.x),
        "native": (own, held.y),
        **{name: (carry(source, each), held.y) for name, each in maps.items()},
        "shuffled labels": (shuffled, held.y),
        "unmapped": (carry(source, unmapped), held.y),
    }
    fvu = {name: score_map(each, held.reversed(), draws=200).fvu for name, each in maps.items()}
    assert held.groups is not None
    return {
        "held_out_captions": len(held.groups.unique()),
        "arms": {name: score(*each, held.groups, colours) for name, each in arms.items()},
        "fvu_back": fvu,
    }


def fit(x: Tensor, groups: Tensor | None, colours: list[str]) -> probes.Probe:
    """A linear probe of the mean over tokens."""
    assert groups is not None
    labels = [colours[group] for group in groups.tolist()]
    return probes.fit(
        x.float().mean(1),
        labels,
        classes=sorted(set(colours)),
        hidden=(),
        per_step="shared",
        groups=groups.tolist(),
        controls=False,
    )


def carry(probe: probes.Probe, back: Any) -> probes.Probe:
    assert isinstance(back, AffineMap)
    return probes.map_probe(probe, back)


def shuffle(colours: list[str], groups: Tensor | None) -> list[str]:
    """Colours of training captions dealt anew among them."""
    assert groups is not None
    there = groups.unique().tolist()
    order = torch.randperm(len(there), generator=torch.Generator().manual_seed(0)).tolist()
    found = list(colours)
    for caption, other in zip(there, order, strict=True):
        found[caption] = colours[there[other]]
    return found


def score(probe: probes.Probe, x: Tensor, groups: Tensor, colours: list[str]) -> dict[str, Any]:
    logits = probe.logits(x.float().mean(1))
    names = list(probe.labels)
    targets = torch.tensor([names.index(colours[group]) for group in groups.tolist()])
    right = (logits.argmax(-1) == targets).float()
    return {"accuracy": interval(right, groups).as_dict(), "auroc": auroc(logits, targets)}


def table(result: dict[str, Any]) -> str:
    """A line for each probe, sites side by side."""
    sites, lines = result["sites"], []
    head = [f"`{site.removeprefix('unet.')}`: accuracy, AUROC, FVU back" for site in sites]
    lines.append(f"| probe | {' | '.join(head)} |")
    lines.append(f"| --- |{' --- |' * len(sites)}")
    for name in next(iter(sites.values()))["arms"]:
        cells = []
        for each in sites.values():
            own, fvu = each["arms"][name], each["fvu_back"].get(name)
            shown = Interval(**own["accuracy"])
            cell = f"{shown.value:.2f} ({shown.low:.2f} to {shown.high:.2f}), {own['auroc']:.2f}"
            cells.append(cell if fvu is None else f"{cell}, {fvu:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Probes of one model on another.")
    parser.add_argument("--captions", type=int, default=160)
    parser.add_argument("--steps", type=int, default=6, help="denoising steps")
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/")
    parser.add_argument("--write", action="store_true", help="put the table into docs/mapping.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
