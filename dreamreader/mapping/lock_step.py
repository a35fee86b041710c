"""A source's denoiser in lock-step: run at each call of the target's, on what belongs there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dreamreader.edits import Donation
from dreamreader.engine import DenoiserCall, EditContext, Evaluation, Reader, Record, ranges
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.recording import Calls, record_calls
from dreamreader.recording.calls import row_seeds
from dreamreader.recording.schedules import match_calls, noise_levels

TRAJECTORIES = ("target", "own")
_Key = tuple[int, int]  # step and evaluation


@dataclass(eq=False)
class LockStep:
    """A source's denoiser beside a target's: what its sites have at each call of the target.

    One call of the source is kept at a time, so memory does not grow with rows or steps.

    Attributes:
        source, target: readers. calls: of the source, the rows of a branch after those of another.
        sites: of the source, that are read.
        partners: number of the source's call by step and evaluation of the target's.
        levels: ratio of noise to signal at calls of the target, where known.
        lacking: steps of the target to which no call of the source belongs.
        trajectory: of the latents that the source sees, see `lock_step`.
    """

    source: Reader
    target: Reader
    calls: Calls
    sites: tuple[str, ...]
    partners: Mapping[_Key, int]
    levels: Mapping[_Key, float]
    lacking: tuple[int, ...] = ()
    trajectory: str = "target"
    _running: Evaluation | None = None
    _found: dict[str, Tensor] | None = None

    @property
    def branches(self) -> tuple[str, ...]:
        """Of the source's calls."""
        return self.calls.moments[0].branches

    @property
    def rows(self) -> int:
        """Prompts with their seeds."""
        return self.calls.rows // len(self.branches)

    @property
    def steps(self) -> list[int]:
        """Steps of the target to which a call of the source belongs."""
        return sorted({step for step, _ in self.partners})

    def reading(self, *sites: str) -> "LockStep":
        """The same that reads some of its sites alone."""
        for site in sites:
            self._check(site)
        return replace(self, sites=sites, _running=None, _found=None)

    def at(self, site: str, rows: Sequence[int] | None = None) -> "LockStepSite":
        """A site as the source of a `Stitch`.

        Args:
            rows: which of the source's rows each row of the run takes; row i takes row i by
                default.

        Raises:
            UnknownName: the site is none of those that are read.
        """
        self._check(site)
        return LockStepSite(self, site, None if rows is None else tuple(rows))

    def _check(self, site: str) -> None:
        if site not in self.sites:
            raise UnknownName("site of the source in lock-step", site, self.sites)

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Within it the target runs."""

        def begin(call: Evaluation) -> None:
            call.moment  # noqa: B018 - while the call runs its time can be asked
            self._running, self._found = call, None

        try:
            with self.target.replay(before=begin):
                yield
        finally:
            self._running = self._found = None

    def values(self, site: str, chosen: Sequence[int], place: EditContext) -> Donation | None:
        """What the source has at a site for rows of its own, at the running call of the target."""
        if self._running is None or place.instant is None:
            raise InvalidInput(
                f"Stitch at {place.site}: no call of the target's denoiser is followed; run it "
                "within follow(), and stitch sites of the denoiser"
            )
        key = place.instant.step, place.instant.evaluation
        number = self.partners.get(key)
        if number is None:
            return None
        if self._found is None:
            self._found = self._run(self._running, number, chosen)
        names = self._running.moment.branches
        on = place.selected.any(1).expand(place.batch).reshape(len(names), -1).any(1).tolist()
        missing = [name for name, edited in zip(names, on, strict=True) if edited]
        missing = [name for name in missing if name not in self.branches]
        if missing:
            raise InvalidInput(
                f"Stitch at {place.site}: the source ran the branches {', '.join(self.branches)}, "
                f"{missing[0]} is stitched too; limit it with branch, or run the source with the "
                "target's guidance"
            )
        known = [name for name in names if name in self.branches]
        order = [known.index(name) if name in known else 0 for name in names]
        return Donation(self._found[site][:, order], level=self.levels.get(key))

    def _run(self, call: Evaluation, number: int, chosen: Sequence[int]) -> dict[str, Tensor]:
        """By site [rows, branches, tokens, features], of the branches that both have."""
        names = call.moment.branches
        known = [name for name in names if name in self.branches]
        parts = [self.branches.index(name) * self.rows for name in known]
        rows = torch.tensor([start + row for start in parts for row in chosen])
        latents = None
        if self.trajectory == "target":
            shown = call.sample.chunk(len(names))
            latents = torch.cat([shown[names.index(name)] for name in known])
            latents = latents.to(self.calls.latents)
        records = [Record(site, device=None) for site in self.sites]
        with self.source.recording(records) as cache, torch.no_grad():
            self.calls(rows, torch.full_like(rows, number), latents)
        found = {}
        for site in self.sites:
            tensor = cache[site].tensor.squeeze(1)  # [branches x rows, tokens, ...]
            flat = tensor.flatten(2).unflatten(0, (len(known), len(chosen)))
            found[site] = flat.transpose(0, 1)
        return found


@dataclass(frozen=True, eq=False)
class LockStepSite:
    """A site of a source in lock-step, for some of its rows; what a `Stitch` asks."""

    run: LockStep
    site: str
    rows: tuple[int, ...] | None = None

    def donate(self, place: EditContext) -> Donation | None:
        """See `dreamreader.edits.StitchSource`."""
        rows = range(self.run.rows) if self.rows is None else self.rows
        if len(rows) != place.total:
            raise InvalidInput(
                f"Stitch at {place.site}: the source has {len(rows)} rows, the run {place.total}"
            )
        return self.run.values(self.site, rows[place.first : place.first + place.rows], place)


def lock_step(
    source: Reader,
    target: Reader,
    prompts: Sequence[str],
    sites: str | Sequence[str],
    *,
    source_prompts: Sequence[str] | None = None,
    seeds: int | Sequence[int] = 0,
    schedule: str = "equal",
    trajectory: str = "target",
    batch_size: int = 16,
    source_arguments: Mapping[str, Any] | None = None,
    target_arguments: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> LockStep:
    """Makes a source ready to run beside a target.

    The source is run once as it is, which tells what its denoiser is called with in every branch,
    and the target once for a single row, which tells its schedule.

    Args:
        source, target: of pipelines with one denoiser, each its own.
        prompts: of both. source_prompts: of the source instead, row by row.
        sites: of the source, in its denoiser.
        seeds: of the rows.
        schedule: which calls belong together, see `recording.schedules.match_calls`; calls of the
            target without a partner are left as they are.
        trajectory: of the latents that the source sees: `target`, those of the target's call, or
            its `own`, from its own seeds.
        batch_size: rows of the source that are computed together.
        arguments: of both runs, their `progress` too. source_arguments, target_arguments: of one.

    Raises:
        InvalidInput: calls have no partners, or latents of the target are none of the source.
        UnknownName: there is no such site, schedule or trajectory.
    """
    if trajectory not in TRAJECTORIES:
        raise UnknownName("trajectory", trajectory, TRAJECTORIES)
    listed = [sites] if isinstance(sites, str) else list(sites)
    names = dict.fromkeys(name for each in listed for name in source.sites(each).names)
    _check_apart(source, target)
    own = list(prompts if source_prompts is None else source_prompts)
    if len(own) != len(prompts):
        raise InvalidInput(f"{len(own)} prompts of the source for {len(prompts)} of the target")
    numbers = row_seeds(seeds, len(own))
    asked = {**arguments, **(source_arguments or {})}
    calls = record_calls(source, own, seeds=numbers, branch=None, batch_size=batch_size, **asked)
    asked = {**arguments, **(target_arguments or {})}
    of_target = record_calls(target, list(prompts[:1]), seeds=numbers[:1], **asked)
    moments = of_target.moments
    levels = [_known_levels(each, made.moments) for each, made in
              ((source, calls), (target, of_target))]  # fmt: skip
    matched = match_calls(calls.moments, moments, _both(levels, schedule), schedule)
    if trajectory == "target":
        _check_latents(source, target, calls, of_target, schedule)
    partners = {_key(moments[b]): a for a, b in matched}
    shown = levels[1]
    found = {} if isinstance(shown, InvalidInput) else dict(
        zip(map(_key, moments), shown, strict=True)
    )  # fmt: skip
    lacking = sorted({each.step for each in moments} - {step for step, _ in partners})
    return LockStep(
        source, target, calls, tuple(names), partners, found, tuple(lacking), trajectory
    )


def describe_lacking(run: LockStep) -> list[str]:
    """A note where calls of the target are left as they are."""
    if not run.lacking:
        return []
    return [f"steps {ranges(run.lacking)} were not stitched: no call of the source belongs to them"]


def _key(moment: DenoiserCall) -> _Key:
    return moment.step, moment.evaluation


def _known_levels(reader: Reader, moments: Sequence[DenoiserCall]) -> list[float] | InvalidInput:
    """Noise levels of calls, or why they are not known."""
    try:
        return noise_levels(reader.subject.scheduler, moments)
    except InvalidInput as error:
        return error


def _both(
    levels: Sequence[list[float] | InvalidInput], schedule: str
) -> tuple[list[float], list[float]] | None:
    if schedule == "fraction":
        return None
    for each in levels:
        if isinstance(each, InvalidInput):
            raise each
    return levels[0], levels[1]  # pyright: ignore[reportReturnType]


def _check_apart(source: Reader, target: Reader) -> None:
    """Refuse two readers of one denoiser: it cannot run within its own call."""
    for reader in (source, target):
        if reader.kind != "pipeline":
            raise InvalidInput(f"lock-step is for denoisers of pipelines, {reader.name} has none")
    own = {id(each) for each in source.denoisers.values()}
    if any(id(each) in own for each in target.denoisers.values()):
        raise InvalidInput(
            "source and target share a denoiser, which cannot run within its own call; load the "
            "model twice, or give one reader for both, whose source site comes before the target's"
        )


def _check_latents(
    source: Reader, target: Reader, calls: Calls, of_target: Calls, schedule: str
) -> None:
    """Refuse latents of the target that are none of the source."""
    hint = "choose trajectory='own'"
    if schedule != "equal":
        raise InvalidInput(
            f"latents of the target have one noise, so the source needs schedule='equal'; {hint}"
        )
    shapes = [list(each.latents.shape[2:]) for each in (calls, of_target)]
    if shapes[0] != shapes[1]:
        raise InvalidInput(
            f"latents of the source are {shapes[0]}, those of the target {shapes[1]}; {hint}"
        )
    kinds = [type(each.subject.scheduler).__name__ for each in (source, target)]
    if kinds[0] != kinds[1]:
        raise InvalidInput(
            f"latents are shared by schedulers of one class, which scale them alike, got "
            f"{kinds[0]} and {kinds[1]}; {hint}"
        )
