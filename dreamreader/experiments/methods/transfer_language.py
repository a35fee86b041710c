"""Transfers between language models: what is refused, the pairs of the maps, and their means."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job
from dreamreader.experiments.methods.base import check_one_kind
from dreamreader.experiments.methods.transfer_base import Carried
from dreamreader.mapping import PairedRows
from dreamreader.recording import Pairs, record_between
from dreamreader.specs.data import read_items
from dreamreader.specs.subject import forward_settings


def check_kinds(method: Carried, job: Job) -> None:
    """Refuse a source of another kind than the subject, and what only pipelines have.

    Raises:
        InvalidInput: says which field has to change.
    """
    check_one_kind(method.source.model, method.source_reader, job)
    if not job.is_language:
        if method.align == "spans":
            raise InvalidInput(
                "method.align: spans are of the texts of language models; leave it out"
            )
        if method.skip:
            raise InvalidInput("method.skip: is of texts of language models; leave it out")
        return
    if method.trajectory != "own":
        raise InvalidInput(
            "method.trajectory: latents are of pipelines; a language model has none, leave it out"
        )
    if method.has_edits:
        raise InvalidInput(
            "method.carry: loreft is carried between pipelines; between language models carry a "
            "direction"
        )
    for name, each in method.named_maps.items():
        if each.method in ("local", "noise", "steps"):
            raise InvalidInput(
                f"method.maps.{name}: {each.method} is of pictures or denoising steps, which a "
                "language model lacks; choose another, such as ridge"
            )


def prompt_job(job: Job) -> Job:
    """The same job that reads its prompts and writes nothing, whatever its call is."""
    pipeline = forward_settings(job.reader)
    return replace(job, spec=job.spec.model_copy(update={"pipeline": pipeline}), memory={})


def language_pairs(method: Carried, job: Job) -> Iterator[tuple[str, PairedRows]]:
    """For each site its paired tokens in both models, which are recorded once."""
    partner = method.partners(job)
    if "pairs" not in job.memory:
        prompts = [item.prompt for item in read_items(method.map_data, "method.map_data")]
        source = method.source_reader
        found: Pairs = record_between(
            source,
            job.reader,
            prompts,
            list(dict.fromkeys(partner.values())),
            list(partner),
            align=method.align or "spans",
            skip=method.skip,
            batch_size=job.batch,
            progress=False,
            source_arguments=forward_settings(source),
            target_arguments=forward_settings(job.reader),
        )
        job.memory["pairs"] = found
    for site, theirs in partner.items():
        yield site, PairedRows.of(job.memory["pairs"], theirs, site)


def token_means(method: Carried, job: Job) -> dict[str, Tensor]:
    """[features] of each site: the subject's mean over the tokens that maps are fitted to.

    Tokens of one model alone, such as that of the beginning, are no part of it.
    """
    return {
        site: rows.moments().target_mean.float().cpu() for site, rows in language_pairs(method, job)
    }
