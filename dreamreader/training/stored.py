"""Rows of probes from a store: read batch by batch, as often as the training goes over them."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dreamreader._progress import ProgressCallback, ProgressEvent, silent
from dreamreader.engine import parse
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.probes import Probe, fit_batches
from dreamreader.probes.labels import Task, encode_labels
from dreamreader.probes.objective import check_counts, count_rows
from dreamreader.probes.split import HELD_OUT, TRAIN, VALIDATION, deal_groups, number_groups
from dreamreader.store.batch import Batch
from dreamreader.store.dataset import StoreDataset
from dreamreader.store.store import Store
from dreamreader.training.labels import complete_rows, of_columns
from dreamreader.training.reliability import Predictions, reliability
from dreamreader.training.specs import ProbeSpec

_ROWS = 4096  # read together
_NO_LABEL = -1


class Stored:
    """Rows of a store's sites with the labels of their samples.

    Args:
        spec: has `labels`. path: of the store.

    Raises:
        InvalidInput: there is no store, or its samples have no such columns.
    """

    def __init__(self, spec: ProbeSpec, path: Path):
        self.spec, self.store = spec, Store(path)
        self.reader: None = None  # no model is run

    @cached_property
    def sites(self) -> list[str]:
        """Names of the sites, those of the spec or all.

        Raises:
            UnknownName: the store has none like it.
        """
        return chosen_sites(self.store, self.spec.sites)

    def check(self) -> None:
        """Refuses sites, pools and labels that cannot be trained on.

        Raises:
            UnknownName, InvalidInput: as `sites` and `LabelledSamples`, or labels of one class.
        """
        samples = self.samples
        for site in self.sites:
            self._pool(site)
        targets = samples.targets[samples.part == TRAIN]
        check_counts(samples.task, count_rows(samples.task, targets))

    def batch(self) -> int:
        return _ROWS

    def identity(self) -> dict[str, Any]:
        """The harvests that the rows are from, and the units that are there."""
        runs = sorted(set(self.store.index["run"].to_pylist()))
        units = hashlib.sha256(repr(self.store.units).encode()).hexdigest()
        return {"runs": runs, "units": units}

    @cached_property
    def samples(self) -> "LabelledSamples":
        return LabelledSamples(self.store, self.spec)

    def train(
        self, sites: Sequence[str], batch: int, report: ProgressCallback = silent
    ) -> Iterator[tuple[str, Probe, dict[str, Any]]]:
        """Trains a probe at each of the sites; see `Prompted.trained`."""
        report(ProgressEvent("probes", 0, len(sites)))
        for done, site in enumerate(sites, 1):
            parts = [SplitRows(self, site, each, batch) for each in (TRAIN, VALIDATION, HELD_OUT)]
            options = self.spec.probe.options
            for name in ("holdout", "jitter"):  # the split is made here
                options.pop(name)
            probe = fit_batches(
                *parts,
                **options | {"pool": self._pool(site)},
                classes=None if self.samples.task.kind == "regress" else self.samples.classes,
                site=site,
                branch=self.spec.branch,
                subject=self._subject,
            )
            held = parts[2].predict(probe)
            yield site, probe, {"rows": self.samples.rows, "reliability": reliability(probe, held)}
            report(ProgressEvent("probes", done, len(sites)))

    def plan(self) -> str:
        """What will be done."""
        samples = self.samples
        lines = [f"store   {self.store.path}", f"sites   {len(self.sites)}"]
        for site in self.sites[:12]:
            dataset = StoreDataset(self.store, site, batch_size=_ROWS, **self.selection)
            lines.append(f"        {site}: {dataset.rows:,} rows, pool {self._pool(site)}")
        counts = ", ".join(f"{name} {n:,}" for name, n in samples.rows.items())
        return "\n".join([*lines, f"samples {counts}", f"labels  {', '.join(samples.task.labels)}"])

    @property
    def selection(self) -> dict[str, Any]:
        """Arguments of a `StoreDataset`."""
        spec = self.spec
        tokens = [spec.tokens] if isinstance(spec.tokens, int) else spec.tokens
        return {"steps": spec.chosen_steps, "branch": spec.branch, "tokens": tokens}

    @cached_property
    def fractions(self) -> dict[tuple[int, int], float]:
        """Share of the trajectory done, by unit and step: harvests of a store may differ in it."""
        index = self.store.index
        units, steps, shares = (index[name].to_pylist() for name in ("unit", "step", "fraction"))
        return dict(zip(zip(units, steps, strict=True), shares, strict=True))

    @property
    def _subject(self) -> str | None:
        specs = [job.spec for job in self.store.manifest.jobs]
        return specs[0].get("subject", {}).get("model") if specs else None

    def _pool(self, site: str) -> str:
        """How the stored rows were pooled.

        Raises:
            InvalidInput: the spec says that they are otherwise.
        """
        stored, wanted = self.store.sites[site].pool, self.spec.probe.pool
        own = {"none": "token", "mean": "mean"}.get(stored)
        if own != wanted:
            fitting = f"give probe.pool: {own}" if own else "a probe reads means or tokens"
            raise InvalidInput(
                f"probe.pool: {wanted}, but rows of {site} are stored with pool {stored}; {fitting}"
            )
        return wanted


def chosen_sites(store: Store, wanted: str | Sequence[str] | None) -> list[str]:
    """Names of a store's sites, those that patterns name or all.

    Raises:
        UnknownName: the store has none like it.
    """
    known = list(store.sites)
    if wanted is None:
        return known
    found: list[str] = []
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        names = [name for name in known if _matches(pattern, name)]
        if not names:
            raise UnknownName("site", pattern, known, f"{store.path} has no other")
        found += names
    return list(dict.fromkeys(found))


def _matches(pattern: str, name: str) -> bool:
    wanted, site = parse(pattern), parse(name)
    same = (wanted.port, wanted.stream) == (site.port, site.stream)
    return same and wanted.matches(site.path)


class LabelledSamples:
    """Targets of a store's samples, and which part of the split each belongs to.

    Attributes:
        task: what is told. rows: samples in all, and with labels.
        classes: as `fit_batches` takes them.
    """

    def __init__(self, store: Store, spec: ProbeSpec):
        tables = {unit: store.samples(unit) for unit in store.units}
        lines = [line for table in tables.values() for line in table.to_pylist()]
        values = of_columns(spec.labels, lines)
        kept, labels = complete_rows(values, spec.probe.task)
        self.task: Task
        self.task, targets = encode_labels(labels, spec.probe.task)
        known = [lines[n].get("prompt", lines[n].get("id")) for n in kept]
        group = number_groups(known, len(kept))
        part = deal_groups(group, targets, spec.probe.holdout, spec.probe.seed)
        self.rows = {"all": len(lines), "labelled": len(kept)}
        self.classes: Any = {name: list(each) for name, each in self.task.classes.items()}
        if list(self.classes) == [""]:
            self.classes = self.classes[""]
        self.targets = torch.zeros(len(lines), *targets.shape[1:], dtype=targets.dtype)
        self.part = torch.full((len(lines),), _NO_LABEL)
        self.targets[kept], self.part[kept] = targets, part
        self._first: dict[int, int] = {}
        at = 0
        for unit, table in tables.items():
            self._first[unit] = at
            at += len(table)

    def of(self, unit: Int[Tensor, " rows"], sample: Int[Tensor, " rows"]) -> Tensor:
        """Numbers of the samples of rows."""
        units, place = unit.unique(return_inverse=True)
        first = torch.tensor([self._first[each] for each in units.tolist()])
        return first[place] + sample.long()

    def labels(self, numbers: Int[Tensor, " rows"]) -> Any:
        """Targets as `fit_batches` takes labels."""
        found = self.targets[numbers]
        if self.task.kind == "multilabel":
            return found
        names = list(self.task.classes)
        if len(names) == 1 and self.task.kind == "classify":
            return found[:, 0]
        return {name: found[:, n] for n, name in enumerate(names)}


class SplitRows:
    """Batches of the rows of one part of the split; call it with the number of an epoch."""

    def __init__(self, source: Stored, site: str, part: int, batch: int):
        self.source, self.part = source, part
        options = {**source.selection, "seed": source.spec.probe.seed, "keys": True}
        self.dataset = StoreDataset(source.store, site, batch_size=batch, **options)

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Any, Tensor, Tensor]]:
        for x, numbers, fraction, step in self.rows(epoch):
            yield x, self.source.samples.labels(numbers), fraction, step

    def rows(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Rows, numbers of their samples, shares of the trajectory, steps."""
        samples, shares = self.source.samples, self.source.fractions
        self.dataset.set_epoch(epoch)
        for batch in self.dataset:
            assert isinstance(batch, Batch)  # as keys are asked for
            numbers = samples.of(batch.unit, batch.sample)
            own = samples.part[numbers] == self.part
            if own.any():
                step = batch.step[own].long()
                when = zip(batch.unit[own].tolist(), step.tolist(), strict=True)
                fraction = torch.tensor([shares[each] for each in when])
                yield batch.values[own], numbers[own], fraction, step

    def predict(self, probe: Probe) -> Iterator[Predictions]:
        """Probabilities and targets of all rows."""
        if probe.task.kind == "regress":
            return
        for x, numbers, fraction, step in self.rows(0):
            targets = self.source.samples.targets[numbers]
            for each in step.unique().tolist() if probe.steps else [None]:
                own = slice(None) if each is None else step == each
                share = fraction[own] if probe.noise_conditioned else None
                found = probe.probabilities(x[own], step=each, fraction=share)
                yield found, targets[own]
