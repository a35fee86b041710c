"""Two subjects that are harvested in lock-step: what they have to have in common, and batches."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from dreamreader.engine import DenoiserCall, Reader, ToldClock
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.harvest.capture import Collector
from dreamreader.harvest.job import HarvestJob, open_job
from dreamreader.harvest.spec import Spec, Target
from dreamreader.recording.calls import Calls
from dreamreader.recording.pairs import both_in_denoiser, in_denoiser
from dreamreader.recording.trajectories import DenoiserRuns, pair_calls
from dreamreader.specs.data import Item
from dreamreader.specs.subject import is_language, open_subject, with_padding


def open_pair(
    spec: Spec, reader: Reader | None = None, target_reader: Reader | None = None
) -> HarvestJob:
    """Opens the subject of a spec, and its target where it has one; see `open_job`.

    Raises:
        InvalidInput: the two do not go together.
    """
    job = open_job(spec, reader)
    if spec.target is not None:
        other = target_reader or with_padding(open_subject(spec.target.subject))
        if is_language(other) != job.is_language:
            raise InvalidInput(
                "target: a language model and a pipeline have no calls in common; give two of one "
                "kind"
            )
        try:
            job.target = open_job(spec.of_target(), other, job.prompts)
        except (InvalidInput, UnknownName) as error:
            raise InvalidInput(f"target: {error}") from error
        _check_pair(job, job.target, spec.target)
    return job


def run_batch(
    job: HarvestJob, items: Sequence[Item], seeds: Sequence[int], collectors: Sequence[Collector]
) -> None:
    """Runs samples and hands the rows of each subject to its collector.

    Of two denoisers the calls that belong together are made, with the latents that the spec says;
    rows of both have the step of the target. Only this batch is in memory.

    Args:
        collectors: of `job.sides`, in whose batch these samples are.
    """
    pair, target = job.spec.target, job.target
    if pair is None or target is None or not in_denoiser(job.reader, job.sites):
        for side, collector in zip(job.sides, collectors, strict=True):
            side.run(items, seeds, collector.streams)
        return
    prompts = [item.prompt for item in items]
    arguments = {**job.settings, "progress": False}, {**target.settings, "progress": False}
    runs = DenoiserRuns(
        (job.reader, target.reader), (prompts, prompts), arguments, seeds, pair.branch, len(items)
    )
    with torch.inference_mode():
        calls = pair_calls(runs, pair.schedule, pair.trajectory).calls
        times = zip(calls[0].moments, calls[1].moments, strict=True)
        named = [
            replace(a, step=b.step, evaluation=b.evaluation, fraction=b.fraction) for a, b in times
        ]
        for side, own, moments, collector in zip(
            job.sides, calls, (named, calls[1].moments), collectors, strict=True
        ):
            only = [replace(each, branches=(pair.branch,)) for each in moments]
            _call_again(side.reader, own, only, collector)


def _call_again(
    reader: Reader, calls: Calls, moments: Sequence[DenoiserCall], collector: Collector
) -> None:
    """Makes calls one by one, each for all rows."""
    rows, clock = torch.arange(calls.rows), ToldClock(reader.subject, moments)
    with reader.recording(collector.streams, clock=clock):
        for number, clock.moment in enumerate(moments):
            calls(rows, torch.full_like(rows, number))


def _check_pair(one: HarvestJob, two: HarvestJob, pair: Target) -> None:
    """Refuse subjects whose rows do not belong together."""
    if one.generates or two.generates:
        raise InvalidInput(
            "target: two models write other texts, whose tokens do not belong together; leave "
            "max_new_tokens out, and they read the same prompts"
        )
    if not both_in_denoiser((one.reader, one.sites), (two.reader, two.sites)):
        if (pair.schedule, pair.trajectory) != ("equal", "own"):
            raise InvalidInput(
                f"target: schedule {pair.schedule!r} and trajectory {pair.trajectory!r} are for "
                f"sites in denoisers; {one.sites[0]} has no steps"
            )
        return
    for capture, _ in (*one.captures, *two.captures):
        if isinstance(capture.tokens, str) and capture.tokens != "all":
            raise InvalidInput(
                f"target: which tokens the word {capture.tokens!r} is, is not known in calls that "
                "are made again; give indices of tokens, or harvest each subject alone"
            )
