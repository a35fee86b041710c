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
from dreamreader.recording import Calls, convert_latents, record_calls, resample_grid
from dreamreader.recording.calls import row_seeds
from dreamreader.recording.levels import call_at_levels, split_levels
from dreamreader.recording.pairs import check_prompts
from dreamreader.recording.schedules import SCHEDULES, match_calls, noise_levels
from dreamreader.recording.trajectories import DenoiserRuns, check_shared

TRAJECTORIES = ("target", "own")
SCHEDULES_OF_STITCHES = (*SCHEDULES, "target")
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
        lacking: steps of the target of which to some call no call of the source belongs.
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
    _found: dict[str, tuple[Tensor, tuple[int, int] | None]] | None = None

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
            self._found = self._run(self._running, number, key, chosen)
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
        values, grid = self._found[site]
        if grid is not None and place.hw is not None:
            values = resample_grid(values, grid, place.hw)
        if order != list(range(len(known))):
            values = values[:, order]
        return Donation(values, level=self.levels.get(key))

    def _run(
        self, call: Evaluation, number: int, key: _Key, chosen: Sequence[int]
    ) -> dict[str, tuple[Tensor, tuple[int, int] | None]]:
        """By site [rows, branches, tokens, features] of branches that both have, and the grid."""
        names = call.moment.branches
        known = [name for name in names if name in self.branches]
        parts = [self.branches.index(name) * self.rows for name in known]
        rows = torch.tensor([start + row for start in parts for row in chosen])
        latents = None
        if self.trajectory == "target":
            shown = call.sample.chunk(len(names))
            latents = torch.cat([shown[names.index(name)] for name in known])
            schedulers = self.target.subject.scheduler, self.source.subject.scheduler
            latents = convert_latents(latents, self.levels[key], *schedulers)
            latents = latents.to(self.calls.latents)
        records = [Record(site, device=None) for site in self.sites]
        with self.source.recording(records) as cache, torch.no_grad():
            self.calls(rows, torch.full_like(rows, number), latents)
        found = {}
        for site in self.sites:
            tensor = cache[site].tensor.squeeze(1)  # [branches x rows, tokens, ...]
            flat = tensor.flatten(2).unflatten(0, (len(known), len(chosen)))
            found[site] = flat.transpose(0, 1), cache[site].hw
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
        schedule: which calls belong together: `equal`, `noise` or `fraction` of two runs, see
            `recording.schedules.match_calls`; or `target`: the source is called at the noise
            levels of the target. Calls of the target without a partner are left as they are.
        trajectory: of the latents that the source sees: `target`, those of the target's call,
            converted where they are mixed of signal and noise in another way, or its `own`, from
            its own seeds.
        batch_size: rows of the source that are computed together.
        arguments: of both runs, their `progress` too. source_arguments, target_arguments: of one.

    Raises:
        InvalidInput: calls have no partners, or latents of the target are none of the source.
        UnknownName: there is no such site, schedule or trajectory.
    """
    check_names(schedule, trajectory)
    own = prompts if source_prompts is None else source_prompts
    check_prompts(prompts, own, batch_size=batch_size)
    listed = [sites] if isinstance(sites, str) else list(sites)
    names = dict.fromkeys(name for each in listed for name in source.sites(each).names)
    _check_apart(source, target)
    own = list(own)
    check_as_many(own, prompts)
    _check_choice(schedule, trajectory)
    numbers = row_seeds(seeds, len(own))
    asked = {**arguments, **(target_arguments or {})}
    shown = record_calls(target, list(prompts[:1]), seeds=numbers[:1], **asked)
    asked = {**arguments, **(source_arguments or {})}
    if schedule == "target":
        asked = {k: v for k, v in asked.items() if k not in ("timesteps", "sigmas")}
        asked |= {"num_inference_steps": 2}  # for what the denoiser is told of the prompts
    calls = record_calls(source, own, seeds=numbers, branch=None, batch_size=batch_size, **asked)
    if trajectory == "target":
        runs = DenoiserRuns((source, target), (own, prompts), ({}, {}), numbers, "cond", batch_size)
        check_shared(runs, (calls, shown))
    levels = _levels(source, calls, schedule), _levels(target, shown, schedule)
    if schedule == "target":
        calls, partners = _at_levels(source, calls, shown, levels[1])
    else:
        both = None if schedule == "fraction" else levels
        matched = match_calls(calls.moments, shown.moments, both, schedule)  # pyright: ignore
        partners = {_key(shown.moments[b]): a for a, b in matched}
    lacking = sorted({each.step for each in shown.moments if _key(each) not in partners})
    keys = map(_key, shown.moments)
    found = {} if levels[1] is None else dict(zip(keys, levels[1], strict=True))
    return LockStep(
        source, target, calls, tuple(names), partners, found, tuple(lacking), trajectory
    )


def describe_lacking(run: LockStep) -> list[str]:
    """A note where calls of the target are left as they are."""
    whole = [step for step in run.lacking if step not in run.steps]
    parts = [step for step in run.lacking if step in run.steps]
    notes = []
    if whole:
        notes.append(
            f"steps {ranges(whole)} were not stitched: no call of the source belongs to them"
        )
    if parts:
        notes.append(
            f"steps {ranges(parts)} were stitched in part: no call of the source belongs to some "
            "of their calls"
        )
    return notes


def check_names(schedule: str, trajectory: str) -> None:
    """Refuse a schedule or trajectory that there is not."""
    for name, value, known in (
        ("trajectory", trajectory, TRAJECTORIES),
        ("schedule of stitches", schedule, SCHEDULES_OF_STITCHES),
    ):
        if value not in known:
            raise UnknownName(name, value, known)


def check_as_many(own: Sequence[str], prompts: Sequence[str]) -> None:
    """Refuse prompts of the source that are not one for each of the target's."""
    if len(own) != len(prompts):
        raise InvalidInput(f"{len(own)} prompts of the source for {len(prompts)} of the target")


def _key(moment: DenoiserCall) -> _Key:
    return moment.step, moment.evaluation


def _check_choice(schedule: str, trajectory: str) -> None:
    if trajectory == "target" and schedule not in ("equal", "target"):
        raise InvalidInput(
            f"latents of the target have one noise level, and schedule={schedule!r} pairs calls of "
            "nearby ones; choose schedule='target', which calls the source at those of the target, "
            "or trajectory='own'"
        )
    if trajectory == "own" and schedule == "target":
        raise InvalidInput(
            "with its own trajectory the source takes its own steps: choose schedule='equal', "
            "'noise' or 'fraction'"
        )


def _levels(reader: Reader, calls: Calls, schedule: str) -> list[float] | None:
    """Noise levels of calls; None where they are neither known nor needed."""
    try:
        return noise_levels(reader.subject.scheduler, calls.moments)
    except InvalidInput:
        if schedule != "fraction":
            raise
        return None


def _at_levels(
    source: Reader, calls: Calls, shown: Calls, levels: Sequence[float] | None
) -> tuple[Calls, dict[_Key, int]]:
    """Calls of the source at the noise levels of the target's, with its partners' numbers."""
    assert levels is not None
    there, beyond = split_levels(source.subject.scheduler, levels)
    if not there:
        raise InvalidInput(
            f"the source's {type(source.subject.scheduler).__name__} has none of the noise levels "
            f"of the target, {max(beyond):.4g} to {min(beyond):.4g} times the signal"
        )
    moments = [shown.moments[number] for number, _, _ in there]
    names = calls.moments[0].branches
    times = [(time, level) for _, time, level in there]
    latents = calls.latents[:, :1].expand(-1, len(there), *calls.latents.shape[2:])
    found = call_at_levels(source, calls, moments, times, latents)
    found = replace(found, moments=tuple(replace(m, branches=names) for m in found.moments))
    return found, {_key(each): number for number, each in enumerate(moments)}


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
