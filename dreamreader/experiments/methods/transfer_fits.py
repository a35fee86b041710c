"""Fits of a transfer: directions and learned edits of both models, and the maps between."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dreamreader._files import explain_disk_errors
from dreamreader.edits import LoReFT
from dreamreader.errors import InvalidInput
from dreamreader.experiments.folder import RunFolder
from dreamreader.experiments.job import Job
from dreamreader.experiments.methods.reft import ReftMethod
from dreamreader.experiments.methods.reft_adapters import load_or_train
from dreamreader.experiments.methods.steer import SteerMethod
from dreamreader.experiments.methods.stitch_maps import fit_options
from dreamreader.experiments.methods.transfer_base import Carried
from dreamreader.experiments.methods.transfer_language import language_pairs, prompt_job
from dreamreader.mapping import (
    ActivationMap,
    AffineMap,
    PairedRows,
    fit_map,
    map_direction,
    map_loreft,
    score_map,
)
from dreamreader.recording import record_between
from dreamreader.reft import Reft
from dreamreader.specs.data import read_items
from dreamreader.specs.parts import listed_seeds
from dreamreader.steering import Directions

Edits = Callable[..., list[LoReFT]]
"""Takes a strength for each row, sites, and a selection."""

Found = Callable[[], tuple[Directions, Directions]]
"""Finds the directions of the subject, and those of the source."""


def carried_directions(
    method: Carried, job: Job, find: Found | None = None
) -> dict[str, Directions]:
    """The directions of a run folder; those that are missing are fitted and written there.

    Args:
        find: of both models; by default differences of prompts.

    Returns:
        By `native`, the names of maps, and `unmapped`.
    """
    assert job.folder is not None
    folder = job.folder.path
    names = ["native", *method.named_maps, *(["unmapped"] if method.has_unmapped else [])]
    files = {name: method.directions_file(folder, name) for name in names}
    if not all(file.is_file() for file in files.values()):
        with job.pause_counting():
            made = _fit_directions(method, job, names, find)
        with explain_disk_errors(folder):
            for name, file in files.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                made[name].save(file)
    return {name: Directions.load(file) for name, file in files.items()}


def carried_edits(method: Carried, job: Job) -> dict[str, Edits]:
    """The learned edits of both models, which are trained where the run folder lacks them.

    Returns:
        By `native`, `random_direction` (not trained), the names of maps, and `unmapped`.
    """
    source, partner = method.source_job(job), method.partners(job)
    own = _train(method, job, list(partner), "native")
    theirs = _train(method, source, list(partner.values()), "source")["edited"]
    maps = affine_maps(method, job)
    found: dict[str, Edits] = {
        "native": _edits_of(own["edited"]),
        "random_direction": _edits_of(own["untrained"]),
    }
    return found | {name: _mapped_edits(theirs, partner, each) for name, each in maps.items()}


def _fit_directions(
    method: Carried, job: Job, names: Sequence[str], find: Found | None
) -> dict[str, Directions]:
    """Directions of both models, and those of the source through each map."""
    partner = method.partners(job)
    if find is not None:
        native, theirs = find()
    else:
        native = difference_directions(method, job, list(partner))
        theirs = difference_directions(method, method.source_job(job), list(partner.values()))
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for site, rows, levels in _pairs(method, job):
        vector = theirs[partner[site]]
        by_step = levels if vector.dim() == 2 else None
        train, held = rows.split(0.2)
        for name in method.named_maps:
            own = _fit_map(method, job, train, held, name, site)
            found[name][site] = map_direction(own, vector, level=by_step)
        if "unmapped" in found:
            padded = map_direction(fit_map(train, "identity"), vector)
            found["unmapped"][site] = _with_norms(padded, native[site])
    found["native"] = dict(native)
    return {name: replace(native, vectors=own, evidence={}) for name, own in found.items()}


def difference_directions(method: Carried, job: Job, sites: Sequence[str]) -> Directions:
    """Directions of one model between the prompts of each pair of `fit`."""
    own = SteerMethod.model_validate(
        _common(method, sites)
        | {"direction": method.direction, "per_step": method.per_step, "strengths": [1.0]}
    )
    return own.fit_directions(_alone(job), ["edited"])["edited"]


def _train(method: Carried, job: Job, sites: Sequence[str], name: str) -> dict[str, Reft]:
    """Adapters of one model by condition, in a folder of their own within that of the run."""
    assert job.folder is not None
    own = ReftMethod.model_validate(
        _common(method, sites)
        | {"ranks": [method.rank], "training": method.training, "controls": ["untrained"]}
    )
    alone = _alone(job)
    alone.folder = RunFolder(job.folder.path / "artifacts" / name)
    with job.pause_counting():
        made = load_or_train(own, alone).adapters
    return {condition: adapter for (condition, *_), adapter in made.items()}


def _common(method: Carried, sites: Sequence[str]) -> dict[str, Any]:
    """What a method that is fitted at these sites shares with the transfer."""
    names = ("branch", "tokens", "fit", "fit_seeds")
    own = {name: getattr(method, name) for name in names}
    if method.fit_tokens is not None:
        own["tokens"] = method.fit_tokens
    return own | {"sites": list(dict.fromkeys(sites)), "group": "all", "controls": []}


def _alone(job: Job) -> Job:
    """The same job, with a memory of its own: cells are those of another method."""
    return prompt_job(job) if job.is_language else replace(job, memory={})


def affine_maps(method: Carried, job: Job) -> dict[str, dict[str, tuple[AffineMap, AffineMap]]]:
    """Maps there and back by name and site; those that are missing are fitted and written."""
    assert job.folder is not None
    folder, partner = job.folder.path, method.partners(job)
    files = [
        method.map_file(folder, n, site, "back") for n in method.named_maps for site in partner
    ]
    if not all(file.is_file() for file in files):
        for site, rows, _ in _pairs(method, job):
            train, held = rows.split(0.2)
            for name in method.named_maps:
                _fit_map(method, job, train, held, name, site)
                _fit_map(method, job, train.reversed(), held.reversed(), name, site, "back")
    found: dict[str, dict[str, tuple[AffineMap, AffineMap]]] = {}
    for name in method.named_maps:
        found[name] = {}
        for site in partner:
            one, two = (
                AffineMap.load(method.map_file(folder, name, site, way)) for way in ("map", "back")
            )
            found[name][site] = one, two
    if method.has_unmapped:
        first = next(iter(found.values()))
        found["unmapped"] = {site: _padded(*each) for site, each in first.items()}
    return found


def _padded(forward: AffineMap, backward: AffineMap) -> tuple[AffineMap, AffineMap]:
    """Identity there and back: cut, or padded with zeros."""
    made = []
    for each in (forward, backward):
        eye = torch.eye(each.d_target, each.d_source)
        made.append(replace(each, weight=eye, bias=torch.zeros(each.d_target)))
    return made[0], made[1]


def _edits_of(adapters: Reft) -> Edits:
    def edits(alpha: Sequence[float], sites: Sequence[str], **selection: Any) -> list[LoReFT]:
        return [each for each in adapters.edits(alpha, **selection) if each.sites[0] in sites]

    return edits


def _mapped_edits(
    adapters: Reft, partner: Mapping[str, str], maps: Mapping[str, tuple[AffineMap, AffineMap]]
) -> Edits:
    def edits(alpha: Sequence[float], sites: Sequence[str], **selection: Any) -> list[LoReFT]:
        theirs = {each.sites[0]: each for each in adapters.edits(alpha, **selection)}
        return [map_loreft(theirs[partner[site]], *maps[site], site) for site in sites]

    return edits


def _fit_map(
    method: Carried,
    job: Job,
    train: PairedRows,
    held: PairedRows,
    name: str,
    site: str,
    way: str = "map",
) -> ActivationMap:
    """Fits a map, and writes it with its scores."""
    assert job.folder is not None
    choice, models = method.named_maps[name], [method.source.model, job.spec.subject.model]
    one, two = models if way == "map" else models[::-1]
    try:
        options = fit_options(choice.method, choice.options)
        own = fit_map(train, choice.method, source_model=one, target_model=two, **options)
    except InvalidInput as error:
        raise InvalidInput(f"method.maps.{name}: {error}") from error
    own = own.with_card(scores=score_map(own, held, draws=200).as_dict())
    file = method.map_file(job.folder.path, name, site, way)
    with explain_disk_errors(job.folder.path):
        file.parent.mkdir(parents=True, exist_ok=True)
        own.save(file)
    return own


def _pairs(method: Carried, job: Job) -> Iterator[tuple[str, PairedRows, Tensor | None]]:
    """For each site its rows in both models, and the noise level of each step.

    Sites of pipelines are recorded one by one: grids may differ, and only one is in memory.
    """
    if job.is_language:
        for site, rows in language_pairs(method, job):
            method.check_rows(rows)
            yield site, rows, None
        return
    source = method.source_job(job)
    items = read_items(method.map_data, "method.map_data")
    drawn = [(item.prompt, seed) for item in items for seed in listed_seeds(method.map_seeds)]
    for site, theirs in method.partners(job).items():
        with job.pause_counting():
            pairs = record_between(
                source.reader,
                job.reader,
                [prompt for prompt, _ in drawn],
                theirs,
                site,
                seeds=[seed for _, seed in drawn],
                trajectory=method.trajectory,
                branch=job.prompt_branch or "cond",
                batch_size=job.batch,
                progress=False,
                source_arguments=source.settings,
                target_arguments=job.settings,
            )
        by_step = None
        if pairs.times is not None and pairs.levels is not None:
            known = dict(zip((each.step for each in pairs.times[1]), pairs.levels, strict=True))
            by_step = torch.tensor([known[step] for step in sorted(known)])
        rows = PairedRows.of(pairs, theirs, site)
        method.check_rows(rows)
        yield site, rows, by_step


def _with_norms(vector: Tensor, like: Tensor) -> Tensor:
    """A vector, step by step, with the norms of another."""
    norm = vector.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vector.dtype).tiny)
    return vector * (like.norm(dim=-1, keepdim=True) / norm)
