"""A harvest that is opened: the spec beside the subject and the prompts that it names."""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from dreamreader.engine import FORWARD, Reader, innermost
from dreamreader.errors import InvalidInput
from dreamreader.harvest.capture import Collector, Sink
from dreamreader.harvest.early_stop import EarlyStop
from dreamreader.harvest.prompts import Prompts
from dreamreader.harvest.spec import Capture, Spec, TokenChoice
from dreamreader.specs.data import Item
from dreamreader.specs.subject import (
    call_settings,
    forward_settings,
    is_language,
    open_subject,
    steps_of,
    with_padding,
)


@dataclass(eq=False)
class HarvestJob:
    """What is run, and how.

    A sample is a prompt with a seed; they are numbered prompt by prompt, and for each prompt seed
    by seed.

    Attributes:
        spec: what is wanted. reader: of the subject.
        prompts: of the spec. captures: of the spec, each with the names of its sites.
        target: of a second subject that is recorded in lock-step.
    """

    spec: Spec
    reader: Reader
    prompts: Prompts
    captures: list[tuple[Capture, list[str]]] = field(default_factory=list)
    target: "HarvestJob | None" = None

    @property
    def sides(self) -> "tuple[HarvestJob, ...]":
        """This one, and that of the target: each has a store."""
        return (self,) if self.target is None else (self, self.target)

    @property
    def is_language(self) -> bool:
        return is_language(self.reader)

    @property
    def samples(self) -> int:
        return self.prompts.count * len(self.spec.seed_list)

    @property
    def sites(self) -> list[str]:
        return [name for _, names in self.captures for name in names]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Arguments of the subject's call. Pictures are not decoded unless the decoder is read."""
        found = call_settings(self.reader, self.spec.subject, self.spec.pipeline)
        if self.is_language or "output_type" in self.spec.pipeline:
            return found
        known = inspect.signature(type(self.reader.subject).__call__).parameters
        if "output_type" in known and not any(name.startswith("vae") for name in self.sites):
            found["output_type"] = "latent"
        return found

    @property
    def generates(self) -> bool:
        """Whether the subject is a language model that writes on, and not only reads."""
        return self.is_language and bool(self.settings.keys() - FORWARD)

    @cached_property
    def call(self) -> dict[str, Any]:
        """The settings; a language model that only reads makes the logits of its last token alone,
        unless its head is captured: those of all tokens would take most of the memory."""
        if not self.is_language or self.generates:
            return self.settings
        model = innermost(self.reader.subject)
        head = model.get_output_embeddings()  # pyright: ignore
        homes = [name for name, module in self.reader.modules.items() if module is head]
        read = any(site.startswith(home) for home in homes for site in self.sites)
        return {**({} if read else forward_settings(self.reader)), **self.settings}

    @cached_property
    def _early_stop(self) -> EarlyStop | None:
        if not self.is_language or self.generates:
            return None
        sites = [site for name in self.sites for site in self.reader.sites(name)]
        return EarlyStop(innermost(self.reader.subject), [site.tap.module for site in sites])

    @property
    def steps(self) -> int | None:
        """Denoising steps of a run; None for a language model."""
        return steps_of(self.reader, self.settings)

    def read(self, start: int, stop: int) -> tuple[list[Item], list[int]]:
        """Prompts and seeds of samples number `start` .. `stop - 1`."""
        seeds = self.spec.seed_list
        first = start // len(seeds)
        items = self.prompts.read(first, -(-stop // len(seeds)))
        numbers = range(start, stop)
        return (
            [items[n // len(seeds) - first] for n in numbers],
            [seeds[n % len(seeds)] for n in numbers],
        )

    def collector(self, sink: Sink) -> Collector:
        calls = 1 if self.is_language and not self.generates else None
        return Collector(self.captures, self.spec.token_seed, sink, calls)

    def run(
        self, items: Sequence[Item], seeds: Sequence[int], record: Sequence[Any], **changes: Any
    ) -> None:
        """Runs samples in one call of the subject.

        Where a language model only reads, calls behind the first end with the block of the last
        site.
        """
        stop = self._early_stop if record else None
        with torch.inference_mode(), stop.around_forward() if stop else nullcontext():
            self.reader.run(
                [item.prompt for item in items],
                record=list(record),
                seeds=list(seeds),
                progress=False,
                **{**self.call, **changes},
            )


def open_job(
    spec: Spec, reader: Reader | None = None, prompts: Prompts | None = None
) -> HarvestJob:
    """Opens the subject of a spec and counts its prompts.

    Args:
        spec: what is wanted.
        reader: used instead of opening `spec.subject`. prompts: of the spec, counted before.

    Raises:
        InvalidInput, UnknownName: a part of the spec does not fit the subject or the data.
    """
    prompts = Prompts(spec.data) if prompts is None else prompts
    if reader is None:
        reader = with_padding(open_subject(spec.subject))
    if is_language(reader):
        most, special = _most_tokens(spec, reader), reader.add_special_tokens
        reader = Reader(reader.subject, reader.tokenizer, most, special)
    elif spec.max_tokens is not None:
        raise InvalidInput("max_tokens: the subject is no language model; leave it out")
    job = HarvestJob(spec, reader, prompts, _captures(spec, reader))
    if job.generates and any(_is_budget(c) for c in spec.capture):
        raise InvalidInput(
            "capture: a budget of tokens needs to know how many steps come, which a language model "
            "that generates does not say; give tokens: {random: ...}"
        )
    return job


def _captures(spec: Spec, reader: Reader) -> list[tuple[Capture, list[str]]]:
    found, homes = [], {}
    for number, capture in enumerate(spec.capture):
        names: list[str] = []
        for pattern in capture.patterns:
            for name in reader.sites(pattern).names:
                if homes.setdefault(name, number) != number:
                    raise InvalidInput(
                        f"capture.{number}.sites: {name} is in capture.{homes[name]} too; a site "
                        "is stored once"
                    )
                if name not in names:
                    names.append(name)
        found.append((capture, names))
    return found


def _most_tokens(spec: Spec, reader: Reader) -> int | None:
    """Tokens that a text may have: what the spec says, or the context without what is generated."""
    config = reader.subject.config
    context = getattr(config, "max_position_embeddings", None)
    context = context or getattr(getattr(config, "text_config", None), "max_position_embeddings", 0)
    room = context - int(spec.pipeline.get("max_new_tokens", 0)) if context else None
    if spec.max_tokens is None:
        return room
    if room is not None and spec.max_tokens > room:
        raise InvalidInput(
            f"max_tokens: {spec.max_tokens} do not fit the model, which takes {room}"
        )
    return spec.max_tokens


def _is_budget(capture: Capture) -> bool:
    return isinstance(capture.tokens, TokenChoice) and capture.tokens.budget is not None
