"""Rows of probes from prompts that are run."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dreamreader._progress import ProgressCallback, ProgressEvent, part_of, silent
from dreamreader.engine import Activation, Reader, Record, check_lengths
from dreamreader.probes import Probe, fit
from dreamreader.probes.labels import encode_labels
from dreamreader.probes.objective import check_counts, count_rows
from dreamreader.probes.split import HELD_OUT, TRAIN, deal_groups, number_groups
from dreamreader.recording.labelled import mean_over_tokens
from dreamreader.specs.batch import activation_bytes, duration, rows_that_fit
from dreamreader.specs.data import read_items
from dreamreader.specs.subject import (
    call_settings,
    is_language,
    open_subject,
    steps_of,
    with_padding,
)
from dreamreader.training.labels import (
    Values,
    complete_rows,
    detect_labels,
    from_detector,
    of_columns,
)
from dreamreader.training.reliability import Predictions, reliability, targets_of
from dreamreader.training.specs import ProbeSpec


class Prompted:
    """Runs the prompts of a spec, prompt by prompt and for each prompt seed by seed.

    Args:
        spec: has `subject`, `data` and `sites`. reader: instead of opening `subject`.

    Raises:
        UnknownName: the data have no such column.
        InvalidInput: a probe reads all tokens of a language model's prompts side by side, which
            are not as many.
    """

    def __init__(self, spec: ProbeSpec, reader: Reader | None = None):
        assert spec.data is not None and spec.subject is not None and spec.sites is not None
        self.spec, self.model = spec, spec.subject
        self.patterns = [spec.sites] if isinstance(spec.sites, str) else spec.sites
        self.items = read_items(spec.data)
        if not from_detector(spec.labels):
            self.columns  # noqa: B018  a wrong column is told before the model is opened
        self.reader = with_padding(reader or open_subject(spec.subject))
        if is_language(self.reader) and spec.tokens is None and spec.probe.pool == "flat":
            check_lengths(self.reader, [item.prompt for item in self.items])

    @cached_property
    def sites(self) -> list[str]:
        """Names of the sites.

        Raises:
            UnknownName: there is none like it.
        """
        found = [name for each in self.patterns for name in self.reader.sites(each).names]
        return list(dict.fromkeys(found))

    @property
    def prompts(self) -> list[str]:
        return [item.prompt for item in self.items for _ in self.spec.seed_list]

    @property
    def seeds(self) -> list[int]:
        return list(self.spec.seed_list) * len(self.items)

    @cached_property
    def columns(self) -> Values:
        """Labels of all rows, where they are columns."""
        rows = [item.columns for item in self.items for _ in self.spec.seed_list]
        return of_columns(self.spec.labels, rows)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Arguments of the subject's call; pictures are decoded for the detector only."""
        found = call_settings(self.reader, self.model, self.spec.pipeline)
        if is_language(self.reader):
            return found
        return found | {"output_type": "pt" if from_detector(self.spec.labels) else "latent"}

    def check(self) -> None:
        """Refuses sites and labels that cannot be trained on, before anything is run.

        Raises:
            UnknownName, InvalidInput: no such site; labels of one class, or too few rows to hold
                some out. Labels that are read from pictures are known later.
        """
        self.sites  # noqa: B018
        if from_detector(self.spec.labels):
            return
        probe = self.spec.probe
        kept, labels = complete_rows(self.columns, probe.task)
        task, targets = encode_labels(labels, probe.task)
        prompts = [self.prompts[n] for n in kept]
        part = deal_groups(number_groups(prompts, len(kept)), targets, probe.holdout, probe.seed)
        check_counts(task, count_rows(task, targets[part == TRAIN]))

    def identity(self) -> dict[str, Any]:
        """What tells these rows from others."""
        rows = [[item.prompt, dict(item.columns)] for item in self.items]
        return {"prompts": hashlib.sha256(repr(rows).encode()).hexdigest()}

    def batch(self) -> int:
        """Rows of a call, by the spec and the memory."""
        auto = self.spec.batch.rows == "auto"
        return rows_that_fit(self.spec.batch, self._row_bytes() if auto else 0)

    def train(
        self, sites: Sequence[str], batch: int, report: ProgressCallback = silent
    ) -> Iterator[tuple[str, Probe, dict[str, Any]]]:
        """Records all rows once, then trains a probe at each of the sites.

        Yields:
            Site, probe, and what its card lacks: `rows`, and `reliability` on held-out ones.
        """
        if not sites:
            return
        cache, values = self._record(sites, batch, report)
        kept, labels = complete_rows(values, self.spec.probe.task)
        rows = {"all": len(self.prompts), "labelled": len(kept)}
        report(ProgressEvent("probes", 0, len(sites)))
        for done, site in enumerate(sites, 1):
            found = cache[site].select(rows=kept)
            probe = fit(found, labels, **self.spec.probe.options, subject=self.model.model)
            held = self._predict_held_out(probe, found, labels)
            yield site, probe, {"rows": rows, "reliability": reliability(probe, [held])}
            report(ProgressEvent("probes", done, len(sites)))

    def plan(self) -> str:
        """What will be done; two rows are run for two steps."""
        self._row_bytes()  # the first run of a model takes longer
        steps, few = steps_of(self.reader, self.settings), dict(self.settings)
        if steps is not None:
            few |= {"num_inference_steps": min(2, steps), "output_type": "latent"}
        prompts = self.prompts[:2]
        began = time.perf_counter()
        own = {"seeds": self.seeds[:2], "progress": False}
        self.reader.run(prompts, record=self._records(self.sites), **own, **few)
        once = (time.perf_counter() - began) / len(prompts) / (min(2, steps) if steps else 1)
        seconds = once * len(self.prompts) * (steps or 1)
        lines = [f"sites   {len(self.sites)}", *(f"        {each}" for each in self.sites[:12])]
        lines += [f"        ... {len(self.sites) - 12} more"] if len(self.sites) > 12 else []
        many, seeds = len(self.prompts), len(self.spec.seed_list)
        lines += [
            f"rows    {many:,}: {len(self.items):,} prompts, {seeds:,} seeds",
            *self._label_lines(),
            f"time    about {duration(seconds)} to record",
        ]
        return "\n".join(lines)

    def _label_lines(self) -> list[str]:
        if from_detector(self.spec.labels):
            return ["labels  read from the pictures"]
        if self.spec.probe.task != "classify":
            return [f"labels  {', '.join(each or 'one' for each in self.columns)}"]
        lines = []
        for name, values in self.columns.items():
            listed = ", ".join(
                f"{each} {n}" for each, n in sorted(Counter(map(str, values)).items())
            )
            lines.append(f"labels  {name}: {listed}" if name else f"labels  {listed}")
        return lines

    def _records(self, sites: Sequence[str]) -> list[Record]:
        spec = self.spec
        reduce = mean_over_tokens if spec.probe.pool == "mean" else None
        branch = None if is_language(self.reader) else spec.branch
        return [
            Record(site, branch=branch, steps=spec.chosen_steps, tokens=spec.tokens, reduce=reduce)
            for site in sites
        ]

    def _record(
        self, sites: Sequence[str], batch: int, report: ProgressCallback
    ) -> tuple[dict[str, Activation], Values]:
        """The activations of all rows, and their labels."""
        with torch.inference_mode():
            found = self.reader.run(
                self.prompts,
                record=self._records(sites),
                seeds=self.seeds,
                batch_size=batch,
                progress=part_of(report, 0, len(self.prompts), "recording"),
                **self.settings,
            )
        if not from_detector(self.spec.labels):
            return dict(found.cache.items()), self.columns
        images = found.images
        images = images if isinstance(images, Tensor) else torch.stack(list(images))
        return dict(found.cache.items()), detect_labels(self.spec.labels, images)

    def _predict_held_out(self, probe: Probe, found: Activation, labels: Any) -> Predictions:
        """Probabilities and targets of the rows that `fit` holds out."""
        targets = targets_of(probe, labels)
        prompts = [row.prompt for row in found.rows]
        group = number_groups(prompts, len(prompts))
        probe_training = self.spec.probe
        part = deal_groups(group, targets, probe_training.holdout, probe_training.seed)
        apart = (part == HELD_OUT).nonzero().flatten().tolist()
        if probe.task.kind == "regress":
            return torch.zeros(0, 1), targets[:0]
        told = probe.probabilities(found.select(rows=apart))  # [rows, steps, (tokens), outputs]
        repeats = told[0, ..., 0].numel()
        told, targets = told.flatten(0, -2), targets[apart].repeat_interleave(repeats, 0)
        real = ~told.isnan().any(-1)  # padding has none
        return told[real], targets[real.to(targets.device)]

    def _row_bytes(self) -> int:
        changes: dict[str, Any] = dict(self.settings)
        if not is_language(self.reader):
            changes["num_inference_steps"] = 1
        prompt = self.items[0].prompt
        return activation_bytes(
            self.reader.subject, lambda: self.reader.run(prompt, seeds=0, progress=False, **changes)
        )
