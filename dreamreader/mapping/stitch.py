"""Runs a target whose sites get the mapped activations of a source."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dreamreader.edits import Donation, Stitch
from dreamreader.engine import (
    Activation,
    ActivationView,
    EditContext,
    EditRequest,
    Reader,
    Record,
    RunResult,
    RunRow,
    StepInfo,
    Stream,
    in_steps,
    normalized_steps,
)
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.mapping.base import ActivationMap
from dreamreader.mapping.lock_step import (
    LockStep,
    check_as_many,
    check_names,
    describe_lacking,
    lock_step,
)
from dreamreader.recording import record_between
from dreamreader.recording.calls import row_seeds
from dreamreader.recording.pairs import check_prompts, in_denoiser

Sites = Mapping[str, tuple[str, ActivationMap | None]]


def stitch(
    source: Reader,
    target: Reader,
    prompts: Sequence[str],
    sites: Sites,
    *,
    strength: float | Sequence[float] | Tensor = 1.0,
    steps: Any = None,
    branch: str | Sequence[str] | None = None,
    tokens: Any = None,
    source_prompts: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 0,
    schedule: str = "equal",
    trajectory: str = "target",
    align: str = "index",
    batch_size: int = 16,
    edits: Sequence[EditRequest] = (),
    record: Any = (),
    source_arguments: Mapping[str, Any] | None = None,
    target_arguments: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> RunResult:
    """Runs the target on prompts, its sites replaced by the map of the source's activations.

    Formula: (1 - strength) h_target + strength map(h_source) at each site

    The source's denoiser runs at every call of the target's (see `lock_step`); text encoders and
    language models have read the prompts before. Of a language model that generates, the prompt is
    stitched: what is generated has no activations in the source. Where both readers are one, the
    source site's values of the same call are taken, so a block is skipped by an identity map from
    its input to its output.

    Args:
        source, target: readers; of two models, or one and the same.
        prompts: of both. source_prompts: of the source instead, row by row.
        sites: by site of the target, a site of the source and the map; None maps nothing.
        strength: one, or one for each row.
        steps, branch, tokens: of the target, as in every edit.
        seeds: of the rows.
        schedule, trajectory: of sites in denoisers, see `lock_step`.
        align: of language models, which tokens belong together: `index` or `spans`, see
            `record_between`. By spans, the last token of each piece is stitched.
        batch_size: rows computed together.
        edits, record: of the target's run, behind the stitches.
        arguments: of both runs. source_arguments, target_arguments: of one.

    Returns:
        What the target's run gave; its `firing.notes` say which steps were left as they are.

    Raises:
        InvalidInput: calls, rows, branches, tokens or latents do not belong together, or a map is
            not of these sites and widths.
        UnknownName: there is no such site.

    Example:
        >>> found = stitch(unet, other, ["a red star"], {                  # doctest: +SKIP
        ...     "unet.up_blocks.1": ("unet.up_blocks.1", ridge)
        ... })
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if isinstance(source_prompts, str):
        source_prompts = [source_prompts]
    texts = listed if source_prompts is None else list(source_prompts)
    check_prompts(listed, texts, batch_size=batch_size)
    check_names(schedule, trajectory)
    check_as_many(texts, listed)
    steps = normalized_steps(steps, "stitch: steps")
    numbers = row_seeds(seeds, len(listed))
    sites = _named(source, target, sites)
    chosen = {"strength": strength, "branch": branch, "tokens": tokens}
    asked = {**arguments, **(target_arguments or {})}
    made = Stitches()
    if source is target:
        made = _within(sites, steps, chosen)
        if source_prompts is not None or source_arguments:
            raise InvalidInput(
                "source and target are one reader, whose values of the same call are taken: "
                "source_prompts and source_arguments have no meaning; load the model twice"
            )
    elif target.kind == "language" or source.kind == "language":
        made = _of_texts(
            source, target, texts, listed, sites, align, batch_size, chosen | {"steps": steps}
        )
    else:
        own = {"source_prompts": source_prompts, "seeds": numbers, "batch_size": batch_size}
        own |= {"schedule": schedule, "trajectory": trajectory} | arguments
        own |= {"source_arguments": source_arguments, "target_arguments": target_arguments}
        made = _of_pipelines(source, target, listed, sites, steps, chosen, own)
    records = [record] if isinstance(record, str | Record | Stream) else list(record)
    with made.follow():
        found = target.run(
            listed,
            edits=[*made.edits, *edits],
            record=[*made.records, *records],
            seeds=numbers,
            batch_size=batch_size,
            **asked,
        )
    found.firing.notes += made.notes
    return found


@dataclass(eq=False)
class Stitches:
    """What a run of a target needs to be stitched.

    Attributes:
        edits, records: of the run. lock_step: that it has to be followed by. notes: for its report.
    """

    edits: list[Stitch] = field(default_factory=list)
    records: list[Stream] = field(default_factory=list)
    lock_step: LockStep | None = None
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Within it the target runs."""
        if self.lock_step is None:
            yield
            return
        with self.lock_step.follow():
            yield


@dataclass(eq=False)
class SameCall:
    """The values that a site of the target itself has in the running call, to be stitched later.

    Attributes:
        site: which runs before the one that gets them.
    """

    site: str
    _kept: tuple[Tensor, StepInfo | None] | None = None

    @property
    def stream(self) -> Stream:
        """To be recorded in the run."""
        return Stream(self.site, self._keep)

    def _keep(self, view: ActivationView) -> None:
        x = view.x if view.minus is None else view.x - view.minus
        self._kept = x.clone(), view.instant

    def donate(self, place: EditContext) -> Donation:
        """See `dreamreader.edits.StitchSource`."""
        kept, self._kept = self._kept, None
        if kept is None or kept[0].shape[0] != place.batch or kept[1] != place.instant:
            raise InvalidInput(
                f"Stitch at {place.site}: {self.site} has not run before it in the same call; take "
                "a source site that comes first, or load the model twice"
            )
        parts = kept[0].unflatten(0, (len(place.branches), place.rows * place.beams))
        if place.beams > 1:
            parts = parts[:, :: place.beams]
        return Donation(parts.transpose(0, 1))


def _within(sites: Sites, steps: Any, chosen: Mapping[str, Any]) -> Stitches:
    """Stitches from a model into itself."""
    made = Stitches()
    for place, (site, own) in sites.items():
        source = SameCall(site)
        made.records.append(source.stream)
        made.edits.append(Stitch(place, source, own, steps=steps, **chosen))
    return made


def _of_pipelines(
    source: Reader,
    target: Reader,
    prompts: list[str],
    sites: Sites,
    steps: Any,
    chosen: Mapping[str, Any],
    own: dict[str, Any],
) -> Stitches:
    inside = [
        in_denoiser(reader, names)
        for reader, names in (
            (source, [site for site, _ in sites.values()]),
            (target, list(sites)),
        )
    ]
    if inside[0] != inside[1]:
        first, (other, _) = next(iter(sites.items()))
        raise InvalidInput(
            f"{other} of the source and {first} of the target are not both in a denoiser, which is "
            "called at every step: their calls have no partners"
        )
    if not inside[0]:
        if steps is not None:
            raise InvalidInput("steps are of sites in a denoiser; these have none")
        return _of_encoders(source, prompts, sites, chosen, own)
    run = lock_step(source, target, prompts, [site for site, _ in sites.values()], **own)
    total = 1 + max([*run.steps, *run.lacking])
    kept = [step for step in run.steps if in_steps(steps, step, total)]
    if not kept:
        raise InvalidInput(f"steps={steps!r} selects none of the {total} steps of the target")
    edits = [
        Stitch(place, run.at(site), own_map, steps=kept, **chosen)
        for place, (site, own_map) in sites.items()
    ]
    return Stitches(edits, lock_step=run, notes=describe_lacking(run))


def record_encoders(
    source: Reader,
    prompts: Sequence[str],
    sites: Sequence[str],
    *,
    seeds: Sequence[int],
    batch_size: int = 16,
    **arguments: Any,
) -> dict[str, Activation]:
    """Activations of a pipeline's sites outside its denoiser, in every branch, by site."""
    few = {"num_inference_steps": 1, "output_type": "latent"}
    found = source.run(
        list(prompts), record=list(sites), seeds=list(seeds), batch_size=batch_size,
        **{**arguments, **few},
    )  # fmt: skip
    return dict(found.cache.items())


def record_texts(
    source: Reader,
    target: Reader,
    prompts: Sequence[str],
    sites: Sequence[str],
    target_sites: Sequence[str],
    *,
    target_prompts: Sequence[str] | None = None,
    align: str = "spans",
    batch_size: int = 16,
    **arguments: Any,
) -> dict[str, Activation]:
    """Activations of a language model's sites at the tokens of another one, by site.

    Args:
        prompts: of both. target_prompts: of the target instead.
        sites: of the source. target_sites: some of the target; which, makes no difference.
        align: see `record_between`; by spans, of each piece the last token.

    Returns:
        `positions` are those of the target's tokens.
    """
    own = list(prompts) if target_prompts is None else list(target_prompts)
    pairs = record_between(
        source, target, prompts, list(sites), list(target_sites), target_prompts=own, align=align,
        batch_size=batch_size, progress=False, **arguments,
    )  # fmt: skip
    assert pairs.positions is not None
    rows = tuple(RunRow(number, text) for number, text in enumerate(own))
    when = (StepInfo(0, float("nan"), None, float("nan"), 0),)
    places = pairs.positions[1].unsqueeze(1)
    return {
        site: Activation(site, values, rows, ("cond",), when, positions=places)
        for site, values in pairs.source.items()
    }


def _of_encoders(
    source: Reader,
    prompts: list[str],
    sites: Sites,
    chosen: Mapping[str, Any],
    own: dict[str, Any],
) -> Stitches:
    for name in ("schedule", "trajectory"):
        own.pop(name)
    one, other = own.pop("source_arguments") or {}, own.pop("target_arguments") or {}
    _check_negative(one, other, own.get("negative_prompt"), chosen["branch"])
    own |= one
    texts = own.pop("source_prompts")
    texts = prompts if texts is None else texts
    names = list(dict.fromkeys(site for site, _ in sites.values()))
    cache = record_encoders(source, texts, names, **own)
    return Stitches(
        [Stitch(place, cache[site], each, **chosen) for place, (site, each) in sites.items()]
    )


def _check_negative(
    one: Mapping[str, Any], other: Mapping[str, Any], both: Any, branch: Any
) -> None:
    """Refuse a negative prompt of the target alone, which the source would put its own for."""
    name = "negative_prompt"
    alone = name in other and name not in one and other[name] != both
    if alone and branch not in ("cond", ["cond"], ("cond",)):
        raise InvalidInput(
            f"stitch: the target has {name} {other[name]!r}, which the source's text encoder has "
            f"not read; give {name} to both, or to each in source_arguments too, or stitch "
            "branch='cond' alone"
        )


def _of_texts(
    source: Reader,
    target: Reader,
    texts: list[str],
    prompts: list[str],
    sites: Sites,
    align: str,
    batch_size: int,
    chosen: dict[str, Any],
) -> Stitches:
    """Stitches of two language models, at the tokens of the prompts that belong together."""
    if align not in ("index", "spans"):
        raise UnknownName("alignment of stitched tokens", align, ("index", "spans"))
    if chosen["steps"] not in (None, 0):
        raise InvalidInput("only the prompt of a language model is stitched: leave steps out")
    if target.kind != source.kind:
        raise InvalidInput(
            f"tokens of {source.name} and {target.name} have no common number or place"
        )
    names = list(dict.fromkeys(site for site, _ in sites.values()))
    found = record_texts(
        source, target, texts, names, list(sites), target_prompts=prompts, align=align,
        batch_size=batch_size,
    )  # fmt: skip
    more: dict[str, Any] = {**chosen, "steps": 0, "partial": align == "spans"}
    return Stitches(
        [Stitch(place, found[site], own, **more) for place, (site, own) in sites.items()]
    )


def _named(source: Reader, target: Reader, sites: Sites) -> Sites:
    """The sites by their full names.

    Raises:
        InvalidInput: a pattern stands for several, or a map was fitted elsewhere.
        UnknownName: there is no such site.
    """
    if not sites:
        raise InvalidInput("stitch: give sites, {target site: (source site, map)}")
    found = {}
    for place, pair in sites.items():
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise InvalidInput(
                f"stitch: {place} needs (source site, map), got {type(pair).__name__}"
            )
        site, own = pair
        if own is not None and not isinstance(own, ActivationMap):
            raise InvalidInput(
                f"stitch: {place} needs a map of dreamreader.mapping or None, got "
                f"{type(own).__name__}"
            )
        one, other = only_site(source, site), only_site(target, place)
        if own is not None:
            check_card(own, one, other)
        found[other] = (one, own)
    return found


def only_site(reader: Reader, site: str) -> str:
    """The full name of a site.

    Raises:
        InvalidInput: a pattern stands for several.
        UnknownName: there is no such site.
    """
    names = reader.sites(site).names
    if len(names) > 1:
        raise InvalidInput(f"{site} stands for {len(names)} sites; name each pair")
    return names[0]


def check_card(own: ActivationMap, source_site: str, target_site: str) -> None:
    """Refuse a map whose card names other sites.

    Raises:
        InvalidInput: says so where it leads the other way.
    """
    card = own.card
    named = (card.source_site, card.target_site)
    wanted = (source_site, target_site)
    wrong = [a for a, b in zip(named, wanted, strict=True) if a is not None and a != b]
    if wrong:
        back = named == wanted[::-1] and source_site != target_site
        hint = "; that is the other way round" if back else ""
        raise InvalidInput(
            f"{own.name} is stitched from {source_site} to {target_site}{hint}; fit one for these "
            "sites, or change its card with with_card()"
        )
