"""A job: a spec beside the subject that it opened, and the one way in which its rows are run.

Job and method stand in one file because each of them is an argument of the other.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from dreamreader.engine import Cache, EditRequest, Reader, RunResult, encoded, is_encoder_decoder
from dreamreader.errors import DreamreaderError, InvalidInput
from dreamreader.experiments.encode import encode_once
from dreamreader.experiments.folder import RunFolder
from dreamreader.experiments.row import Row, RowBatch, units
from dreamreader.experiments.spec import ExperimentFields
from dreamreader.metrics import Metric, Outputs, build
from dreamreader.metrics.next_token_kl import mean_divergence
from dreamreader.metrics.perplexity import mean_surprisal
from dreamreader.recording.labelled import record_batches
from dreamreader.specs.data import Item, pairs_only, read_items
from dreamreader.specs.parts import Part
from dreamreader.specs.subject import (
    call_settings,
    is_language,
    open_subject,
    steps_of,
    with_padding,
)


def _ignore(rows: float) -> None:
    pass


class Method(Part):
    """Base of all methods. A method decides what the rows are; batches, files, resuming and the
    report are not its concern."""

    kind: Any  # the name of each method in specs
    pairs: ClassVar[bool] = False  # whether the data must be pairs

    def check(self, job: "Job") -> None:
        """Refuse a sweep that is too long, or does not fit the subject, before anything runs."""

    def inputs(self, job: "Job") -> dict[str, Any]:
        """What the numbers depend on beside the spec and the data, for the fingerprint."""
        return {}

    def rows(self, job: "Job") -> list[Row]:
        """All rows of the run, in the order in which they are computed."""
        raise NotImplementedError

    def prepare(self, job: "Job") -> None:
        """What has to be fitted before the first row; kept in the run folder."""

    def edits_of(self, job: "Job", rows: Sequence[Row]) -> list[EditRequest]:
        """Edits of one batch; a strength has one value for each of its rows."""
        return []

    def around(self, job: "Job") -> AbstractContextManager[Any]:
        """What every batch runs inside of."""
        return nullcontext()

    def records(self, job: "Job", rows: Sequence[Row]) -> list[Any]:
        """What is recorded in one batch."""
        return []

    def compared_tokens(self, job: "Job", rows: Sequence[Row]) -> Tensor | None:
        """[rows, n] tokens of each prompt whose next ones are compared with those of the unedited
        model, -1 where there are fewer; None: all."""
        return None

    def columns(
        self, job: "Job", rows: Sequence[Row], result: RunResult
    ) -> Mapping[str, Sequence[Any]]:
        """Columns of the rows that come from the method itself."""
        return {}


class MethodSpec(ExperimentFields):
    """A spec with any method; `ExperimentSpec` lists the kinds that there are."""

    method: Method


@dataclass(eq=False)
class Job:
    """What the methods and the runner work with.

    Attributes:
        spec: what is wanted, reader: of the subject.
        items: prompts or pairs. metrics: as objects.
        folder: the run folder; None while only planning.
        batch: most rows of one call.
        advance: called with every finished share of a row.
    """

    spec: MethodSpec
    reader: Reader
    items: list[Item]
    metrics: list[Metric]
    folder: RunFolder | None = None
    batch: int = 1
    advance: Callable[[float], Any] = _ignore
    memory: dict[Any, Any] = field(default_factory=dict)

    @property
    def seeds(self) -> Sequence[int]:
        return self.spec.seed_list

    @property
    def is_language(self) -> bool:
        return is_language(self.reader)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Arguments of the subject's call."""
        return call_settings(self.reader, self.spec.subject, self.spec.pipeline)

    @cached_property
    def steps(self) -> int | None:
        """Denoising steps of a run; None for a language model."""
        return steps_of(self.reader, self.settings)

    @cached_property
    def rows(self) -> list[Row]:
        return self.spec.method.rows(self)

    @cached_property
    def units(self) -> list[RowBatch]:
        """The batches that the rows are run in."""
        return units(self.rows, self.batch)

    @cached_property
    def bases(self) -> frozenset[int]:
        """Numbers of the rows that others are compared with."""
        return frozenset(row.base for row in self.rows if row.base is not None)

    @property
    def prompt_branch(self) -> str | None:
        """The branch of the prompt where guidance has several; None where there is one."""
        guided = float(self.settings.get("guidance_scale", 7.5)) > 1
        return "cond" if guided and not self.is_language else None

    def use_batch(self, size: int) -> None:
        """Sets the rows of one call, and forgets what was made for another size."""
        if size != self.batch:
            for name in ("rows", "units", "bases"):
                self.__dict__.pop(name, None)
            self.memory.clear()
        self.batch = size

    def use_folder(self, folder: RunFolder) -> None:
        """Goes to a run folder, and forgets what was kept of another one."""
        if self.folder is None or self.folder.path != folder.path:
            self.memory.clear()
        self.folder = folder

    def unit_of(self, row: int) -> RowBatch:
        """The batch that a row is in."""
        return self.units[bisect_right(self.units, row, key=lambda each: each.start) - 1]

    @contextmanager
    def count_rows(self, advance: Callable[[float], Any]) -> Iterator[None]:
        """Calls `advance` with every share of a row that is finished within."""
        before, self.advance = self.advance, advance
        try:
            yield
        finally:
            self.advance = before

    def pause_counting(self) -> AbstractContextManager[None]:
        """What is run within does not count as rows that were finished."""
        return self.count_rows(_ignore)

    def needs(self, what: str) -> bool:
        """Whether a metric reads these outputs (`images`, `latents`, `noise`, ...)."""
        return any(what in metric.needs for metric in self.metrics)

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        edits: Sequence[Any] = (),
        record: Sequence[Any] = (),
        **changes: Any,
    ) -> tuple[RunResult, Tensor | None]:
        """Runs rows in one call of the subject; the result and the final latents."""
        arguments, last = {**self.settings, **changes}, _LastLatents(self, len(prompts))
        if not self.is_language:
            arguments |= {"output_type": "pt", "callback_on_step_end": last.tick}
        with torch.inference_mode(), encode_once(self.reader, [*edits, *record]):
            result = self.reader.run(
                list(prompts),
                edits=list(edits),
                record=list(record),
                seeds=list(seeds),
                progress=False,
                **arguments,
            )
        if self.is_language:
            self.advance(len(prompts))
        return result, last.latents

    def run_batch(self, rows: Sequence[Row]) -> tuple[Outputs, RunResult]:
        """Runs the rows of one batch as the method says."""
        method = self.spec.method
        edits = method.edits_of(self, rows)
        record = [*method.records(self, rows), *self.noise_records()]
        with method.around(self):
            prompts, seeds = [row.prompt for row in rows], [row.seed for row in rows]
            result, latents = self.draw(prompts, seeds, edits, record)
            more = {
                "surprisal": self.surprisal(rows, edits),
                "divergence": self.divergence(rows, edits, result),
            }
        return replace(self.outputs(rows, result, latents), **more), result

    def record(self, rows: Sequence[tuple[str, int]], records: Sequence[Any]) -> Iterator[Cache]:
        """Recordings of prompts with their seeds, batch by batch."""

        def draw(prompts: list[str], seeds: list[int], wanted: Sequence[Any]) -> Cache:
            return self.draw(prompts, seeds, record=wanted)[0].cache

        return record_batches(draw, rows, records, self.batch)

    def outputs(self, rows: Sequence[Row], result: RunResult, latents: Tensor | None) -> Outputs:
        """What the metrics of these rows get."""
        columns = [row.columns() for row in rows]
        if not self.is_language:
            images = result.images
            images = images if isinstance(images, Tensor) else torch.stack(list(images))
            return Outputs(columns, images.float(), latents, self._noise(result))
        logits = getattr(result.output, "logits", None)
        last = None if logits is None else logits[:, -1].float()
        if result.text is not None and len(result.text) != len(rows):
            raise InvalidInput(
                f"{len(result.text)} texts for {len(rows)} rows: leave num_return_sequences out, "
                "and give more seeds"
            )
        return Outputs(columns, logits=last, text=result.text, tokenizer=self.reader.tokenizer)

    def surprisal(self, rows: Sequence[Row], edits: Sequence[Any]) -> Tensor | None:
        """[rows] mean surprisal of the texts that a metric asks for, under the edits of the rows.

        Raises:
            InvalidInput: the subject is no language model, a row has no such text, or it is one
                token.
        """
        columns = [each.text for each in self.metrics if "surprisal" in each.needs]  # pyright: ignore
        if not columns:
            return None
        texts = [row.columns().get(columns[0]) for row in rows]
        missing = next((n for n, text in enumerate(texts) if not isinstance(text, str)), None)
        if missing is not None or not self.is_language:
            where = f"entry {rows[missing or 0].item.id!r}"
            raise InvalidInput(
                f"perplexity needs a language model, and a text in the column {columns[0]!r} of "
                f"{where}"
            )
        if is_encoder_decoder(self.reader.subject):
            raise InvalidInput("perplexity needs a decoder; this model has an encoder for the text")
        listed = list(map(str, texts))
        with torch.inference_mode():
            own = {"seeds": [row.seed for row in rows], "progress": False}
            found = self.reader.run(listed, edits=list(edits), **own)
            return mean_surprisal(found.output.logits, **encoded(self.reader, listed))

    def divergence(
        self, rows: Sequence[Row], edits: Sequence[Any], result: RunResult
    ) -> Tensor | None:
        """[rows] how far the edits move the next tokens of the prompts, where a metric asks.

        Raises:
            InvalidInput: the subject is no language model with a decoder alone.
        """
        if not self.needs("divergence"):
            return None
        if not self.is_language or is_encoder_decoder(self.reader.subject):
            raise InvalidInput(
                "next_token_kl needs a language model that has a decoder alone, whose every token "
                "has a next one"
            )
        if not edits:
            return torch.zeros(len(rows))
        texts = [row.prompt for row in rows]
        own = {"seeds": [row.seed for row in rows], "progress": False}
        mask = encoded(self.reader, texts)["attention_mask"].bool()
        with torch.inference_mode():
            edited = getattr(result.output, "logits", None)
            if edited is None or edited.shape[1] != mask.shape[1]:  # of the last position alone
                edited = self.reader.run(texts, edits=list(edits), **own).output.logits
            key, (held, native) = (texts, own["seeds"]), self.memory.get("native", (None, None))
            if native is None or held != key:  # batches of a sweep often have the same prompts
                native = self.reader.run(texts, **own).output.logits
                self.memory["native"] = key, native
            tokens = self.spec.method.compared_tokens(self, rows)
            return mean_divergence(native, edited, _own_tokens(mask, tokens))

    def _noise(self, result: RunResult) -> dict[int, Tensor]:
        """What the denoiser gave, by step, [rows, values]."""
        found = result.cache.get(self.noise_site or "")
        if found is None:
            return {}
        return {each.step: found.tensor[:, n].flatten(1) for n, each in enumerate(found.steps)}

    @cached_property
    def noise_site(self) -> str | None:
        """The denoiser as a site, where a metric reads what it gives."""
        if not self.needs("noise"):
            return None
        names = getattr(self.reader.subject, "components", {})
        return next((name for name in ("unet", "transformer", "prior") if name in names), None)

    def noise_records(self) -> list[Any]:
        """The recording that the metrics of noise predictions need."""
        from dreamreader.engine import Record

        if self.noise_site is None:
            return []
        return [Record(self.noise_site, branch=self.prompt_branch)]


def _own_tokens(mask: Tensor, tokens: Tensor | None) -> Tensor:
    """[rows, places] where the tokens of these numbers among a row's own are; all of its own."""
    if tokens is None:
        return mask
    number = torch.where(mask, mask.cumsum(1) - 1, -2)
    return (number[:, :, None] == tokens.to(mask.device)[:, None, :]).any(2)


class _LastLatents:
    """Follows the steps of one call: counts rows, keeps the latents of the last one."""

    def __init__(self, job: Job, rows: int):
        self.job = job
        self.rows = rows
        self.latents: Tensor | None = None
        self._wanted = job.needs("latents")

    def tick(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        self.job.advance(self.rows / (self.job.steps or 1))
        if self._wanted and isinstance(values.get("latents"), Tensor):
            self.latents = values["latents"].detach().float().clone()
        return values


def open_job(spec: MethodSpec, reader: Reader | None = None, metrics: Sequence[Metric] = ()) -> Job:
    """Reads the data, opens the subject and the metrics of a spec.

    Args:
        spec: what is wanted.
        reader: used instead of opening `spec.subject`.
        metrics: beside those of the spec.

    Raises:
        InvalidInput, UnknownName: a part of the spec does not fit the subject or the data.
    """
    items = read_items(spec.data)
    if spec.method.pairs:
        pairs_only(items, f"data, for method {spec.method.kind}")
    found = [*_build_metrics(spec.metrics), *metrics]
    opened = reader if reader is not None else with_padding(open_subject(spec.subject))
    return Job(spec, opened, items, found)


def _build_metrics(named: Sequence[Any]) -> list[Metric]:
    found = []
    for number, each in enumerate(named):
        try:
            found.append(build(each))
        except DreamreaderError as error:
            raise InvalidInput(f"metrics.{number}: {error}") from error
    return found
