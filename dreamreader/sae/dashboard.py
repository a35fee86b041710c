"""Pages and files that show what latents respond to."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamreader._files import write_atomic
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.report import (
    Charts,
    Curves,
    Folded,
    Gallery,
    Number,
    Numbers,
    Picture,
    Report,
    Section,
    Series,
    Table,
    Text,
    Tokens,
)
from dreamreader.report.heat import overlay
from dreamreader.sae.examples import FeatureExamples, StrongestRows

ORDERS = ("activity", "correlation", "frequency")
_SHOWN = 5  # correlations of a latent


def write_dashboard(
    examples: FeatureExamples,
    path: str | os.PathLike[str],
    *,
    title: str = "Latents",
    images: Sequence[Any] | None = None,
    texts: Sequence[Sequence[str]] | None = None,
    features: Sequence[int] | None = None,
    order: str = "activity",
    count: int = 40,
    names: Mapping[int, str] | None = None,
) -> Path:
    """Writes one HTML page of latents: strongest rows, where, when, and what goes with them.

    Args:
        examples: what was collected; the order is over all latents, not within a part of them.
        path: of the page. title: of the page.
        images: a picture for each row. texts: pieces of text for each row, one for each token.
        features: latents to show; by default the first of `order`.
        order: `activity` (mean code), `correlation` (the largest with any attribute) or
            `frequency`, largest first.
        count: how many latents, where `features` does not say it.
        names: of latents, such as those that somebody gave them.

    Returns:
        The path.

    Raises:
        InvalidInput: there are fewer pictures or texts than rows, neither, or a latent is none.
        UnknownName: of the order.
    """
    for name, given in (("images", images), ("texts", texts)):
        if given is not None and len(given) < examples.rows:
            raise InvalidInput(f"dashboard: {len(given)} {name} for {examples.rows} rows")
    if images is None and texts is None:
        raise InvalidInput("dashboard: give images or texts, one for each row")
    if order not in ORDERS:
        raise UnknownName("order of a dashboard", order, ORDERS)
    related = examples.correlations()
    chosen = list(features) if features is not None else _ranked(examples, related, order)[:count]
    wrong = [each for each in chosen if not 0 <= each < examples.latents]
    if wrong:
        raise InvalidInput(f"dashboard: latent {wrong[0]} of {examples.latents} is none")
    sections = [_overview(examples, related, chosen, names or {})]
    sections += [_latent(examples, related, each, images, texts, names or {}) for each in chosen]
    alive = int((examples.fired > 0).sum())
    active = float(examples.fired.sum()) / max(1, examples.tokens)
    opening = Numbers(
        [
            Number(f"{alive:,}", "latents that fired", f"of {examples.latents:,}"),
            Number(f"{active:.1f}", "active at a token, on average"),
            Number(f"{examples.rows:,}", "rows", f"{examples.tokens:,} tokens and steps"),
        ]
    )
    lead = f"{len(chosen)} of {examples.latents:,} latents, by {order}."
    return Report(title, lead, [opening], sections).write(path)


def write_neuronpedia(
    examples: FeatureExamples,
    path: str | os.PathLike[str],
    texts: Sequence[Sequence[str]],
    *,
    model: str,
    source: str,
    features: Sequence[int] | None = None,
) -> Path:
    """Writes the strongest texts of latents as Neuronpedia's feature objects, a JSON list.

    Args:
        examples: collected at one step, as texts are. path: of the file.
        texts: pieces of text for each row, one for each token.
        model: its name there, such as `gpt2-small`. source: layer and set, such as `6-res-jb`.
        features: latents; all that fired by default.

    Returns:
        The path.

    Raises:
        InvalidInput: there are fewer texts than rows, or several steps.

    Reference:
        Feature objects of neuronpedia.org: `modelId`, `layer`, `index`, `maxActApprox`,
        `frac_nonzero`, `activations` of `tokens`, `values`, `maxValue`, `maxValueTokenIndex`.
    """
    if len(texts) < examples.rows:
        raise InvalidInput(f"neuronpedia: {len(texts)} texts for {examples.rows} rows")
    if len(examples.steps) > 1:
        raise InvalidInput(
            "neuronpedia: its activations are of texts, here there are several steps"
        )
    chosen = examples.fired.nonzero().squeeze(1).tolist() if features is None else list(features)
    listed = []
    for feature in chosen:
        own = examples.of(feature)
        listed.append(
            {
                "modelId": model,
                "layer": source,
                "index": str(feature),
                "maxActApprox": max(own.scores, default=0.0),
                "frac_nonzero": float(examples.frequency[feature]),
                "activations": [
                    _activation(texts[row], heat)
                    for row, heat in zip(own.rows, own.maps, strict=True)
                ],
            }
        )
    return write_atomic(path, json.dumps(listed, ensure_ascii=False, allow_nan=False))


def _activation(pieces: Sequence[str], heat: Tensor) -> dict[str, Any]:
    tokens, values = _own_tokens(pieces, heat)
    largest = max(range(len(values)), key=values.__getitem__)
    return {
        "tokens": tokens,
        "values": values,
        "maxValue": values[largest],
        "maxValueTokenIndex": largest,
        "minValue": min(values),
    }


def _own_tokens(pieces: Sequence[str], heat: Tensor) -> tuple[list[str], list[float]]:
    """The pieces of a row and their values, padding left out.

    Raises:
        InvalidInput: there are not as many pieces as tokens.
    """
    values = [each for each in heat.tolist() if not math.isnan(each)]
    if len(pieces) != len(values):
        raise InvalidInput(f"a text has {len(pieces)} pieces for {len(values)} tokens")
    return list(pieces), values


def _ranked(examples: FeatureExamples, related: Mapping[str, Tensor], order: str) -> list[int]:
    """Latents that fired, by the order."""
    if order == "frequency":
        score = examples.frequency
    elif order == "activity" or not related:
        score = examples.by_step.mean(1)
    else:
        score = torch.stack(list(related.values())).abs().nan_to_num(0.0).amax(0)
    listed = score.argsort(descending=True).tolist()
    return [each for each in listed if int(examples.fired[each])]


def _overview(
    examples: FeatureExamples,
    related: Mapping[str, Tensor],
    chosen: Sequence[int],
    names: Mapping[int, str],
) -> Section:
    columns = ["latent", "active", "largest", "strongest step"]
    columns += ["goes with"] if related else []
    rows = []
    for feature in chosen:
        own = examples.of(feature)
        step = examples.steps[int(examples.by_step[feature].argmax())]
        row = [
            _title(feature, names),
            f"{100 * float(examples.frequency[feature]):.2g} %",
            f"{max(own.scores, default=0.0):.3g}",
            step,
        ]
        best = _related(related, feature)[:1]
        row += [f"{best[0][0]} ({best[0][1]:+.2f})" if best else "–"] if related else []
        rows.append(row)
    return Section("Overview", [Table(columns, rows)])


def _latent(
    examples: FeatureExamples,
    related: Mapping[str, Tensor],
    feature: int,
    images: Sequence[Any] | None,
    texts: Sequence[Sequence[str]] | None,
    names: Mapping[int, str],
) -> Section:
    own = examples.of(feature)
    blocks: list[object] = []
    if not own.rows:
        blocks.append(Text("It was not active on any row."))
    elif images is not None:
        blocks.append(_pictures(own, images, examples.hw, feature))
    if own.rows and texts is not None:
        pieces = [
            (f"row {row}, {score:.3g}", list(zip(*_own_tokens(texts[row], heat), strict=True)))
            for row, score, heat in zip(own.rows, own.scores, own.maps, strict=True)
        ]
        blocks.append(Tokens(pieces, max(own.scores)))
    charts: list[Any] = []
    if len(examples.steps) > 1:
        activity = examples.by_step[feature].tolist()
        line = Series("mean code", [float(each) for each in examples.steps], activity)
        highest = max(activity) or 1.0
        charts.append(Curves("Activity", [line], "step", y_range=(0.0, highest), percent=False))
    listed = [(name, f"{value:+.2f}") for name, value in _related(related, feature)[:_SHOWN]]
    if charts:
        blocks.append(Charts(charts))
    if listed:
        blocks.append(Folded("What it goes with", [Table(("attribute", "correlation"), listed)]))
    return Section(_title(feature, names), blocks)


def _pictures(
    own: StrongestRows, images: Sequence[Any], hw: tuple[int, int] | None, feature: int
) -> Gallery:
    plain = [
        Picture(images[row], f"row {row}, {score:.3g}", f"{score:.3g}")
        for row, score in zip(own.rows, own.scores, strict=True)
    ]
    lines = [("picture", plain)]
    if hw is not None:
        maps = [
            Picture(overlay(images[row], heat.view(hw), 0.75), f"where latent {feature} is active")
            for row, heat in zip(own.rows, own.maps, strict=True)
        ]
        lines.append(("where", maps))
    return Gallery(lines)


def _related(related: Mapping[str, Tensor], feature: int) -> list[tuple[str, float]]:
    """Attributes and correlations, the strongest first."""
    found = [(name, float(each[feature])) for name, each in related.items()]
    known = [each for each in found if not math.isnan(each[1])]
    return sorted(known, key=lambda each: -abs(each[1]))


def _title(feature: int, names: Mapping[int, str]) -> str:
    return f"Latent {feature}: {names[feature]}" if feature in names else f"Latent {feature}"
