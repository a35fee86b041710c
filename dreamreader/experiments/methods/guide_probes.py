"""The probes of a guidance run: fitted from one recording of prompts, kept in its folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from dreamreader._files import explain_disk_errors
from dreamreader.artifacts.file import load_described, save_described
from dreamreader.edits import Mlp
from dreamreader.engine import Cache, Record
from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job, Method
from dreamreader.experiments.methods.base import SweptPlaces, one_selection
from dreamreader.probes import Probe
from dreamreader.probes import fit as fit_probe
from dreamreader.recording.labelled import joined_rows, mean_over_tokens
from dreamreader.specs.data import Item, read_items
from dreamreader.specs.parts import AnySeeds, Count, Data, Seeds, listed_seeds
from dreamreader.steering import LabelMeans
from dreamreader.training.parts import ProbeTraining

JOINED = " + "  # between the labels of a target, as the detector reads them


@dataclass(eq=False)
class FittedProbes:
    """Probes and means of labels, by site.

    Attributes:
        probes: of each site. differences: what a label's mean has beside those of the others, by
            site and label, [steps, features].
    """

    probes: dict[str, Probe]
    differences: dict[str, dict[str, Tensor]]

    def mlps(self, sites: Sequence[str], random: bool) -> dict[str, Any]:
        """What `ProbeGuidance` takes: the MLPs by site, or random ones of the same norms."""
        found: dict[str, Any] = {}
        for number, site in enumerate(sites):
            probe = self.probes[site]
            own = [_random(each, 7 + number) for each in probe.mlps] if random else probe.mlps
            found[site] = list(own) if probe.steps else own[0]
        return found

    def contrast(self, site: str, label: str) -> Tensor:
        return self.differences[site][label]


class ProbedLabels(Method, SweptPlaces):
    """Base of methods that fit probes of labels at the sites that they sweep."""

    fit: Data = Field(description="Prompts whose activations the probes are fitted to.")
    fit_seeds: AnySeeds = Field(
        default_factory=lambda: Seeds(start=100_000), description="Seeds of these prompts."
    )
    fit_tokens: Count | list[int] | None = Field(
        None,
        description="Tokens that the probes are fitted to: so many random ones of each activation "
        "(pool token), or positions; by default those that are guided.",
    )
    labels: dict[str, str] = Field(
        min_length=1,
        description="Columns of the fit's prompts by attribute, such as color: source_color.",
    )
    probe: ProbeTraining = Field(default_factory=ProbeTraining)

    def load_or_fit(self, job: Job) -> FittedProbes:
        """The probes of a run folder; those that are missing are fitted and written there."""
        assert job.folder is not None
        sites = list(dict.fromkeys(site for cell in self.cells(job) for site in cell.sites))
        files = {site: probe_file(job.folder.path, number) for number, site in enumerate(sites)}
        means = job.folder.path / "artifacts" / "differences.safetensors"
        if not (means.is_file() and all(file.is_file() for file in files.values())):
            self._fit(job, files, means)
        content, tensors = load_described(means, "differences")
        differences: dict[str, dict[str, Tensor]] = {}
        for name, (site, label) in content["of"].items():
            differences.setdefault(site, {})[label] = tensors[name]
        return FittedProbes({site: Probe.load(file) for site, file in files.items()}, differences)

    def values(self, job: Job) -> dict[str, list[str]]:
        """The labels of each attribute, as they occur in the fit's prompts."""
        if "values" not in job.memory:
            items = self.fit_items()
            job.memory["values"] = {name: self.labels_of(items, name) for name in self.labels}
        return job.memory["values"]

    def labels_of(self, items: Sequence[Item], attribute: str) -> list[str]:
        """The labels of an attribute that occur in prompts, in alphabetic order."""
        return sorted(set(self.column_of(items, attribute)))

    def column_of(self, items: Sequence[Item], attribute: str) -> list[str]:
        """The label of every prompt.

        Raises:
            InvalidInput: an entry has none, or one that cannot be told apart in a target.
        """
        column, found = self.labels[attribute], []
        for item in items:
            value, where = item.columns.get(column), f"method.labels.{attribute}: entry {item.id!r}"
            if value is None:
                there = ", ".join(item.columns) or "none"
                raise InvalidInput(
                    f"{where} of method.fit has no value in the column {column}; it has {there}"
                )
            if JOINED in str(value):
                raise InvalidInput(
                    f"{where} of method.fit: {value!r} holds {JOINED!r}, which joins labels"
                )
            found.append(str(value))
        return found

    def fit_items(self) -> list[Item]:
        return read_items(self.fit, "method.fit")

    def _fit(self, job: Job, files: dict[str, Path], means: Path) -> None:
        items = self.fit_items()
        rows = [(item, seed) for item in items for seed in listed_seeds(self.fit_seeds)]
        cache = self._record(job, list(files), rows)
        prompts = [item for item, _ in rows]
        labels = {attribute: self.column_of(prompts, attribute) for attribute in self.labels}
        assert job.folder is not None
        with explain_disk_errors(job.folder.path):
            means.parent.mkdir(parents=True, exist_ok=True)
            for site, file in files.items():
                options = {**self.probe.options, "subject": job.spec.subject.model}
                probe = fit_probe(cache[site], labels, **options)
                probe.save(file)
            tensors, of = {}, {}
            for site in files:
                for label, vector in _contrasts(cache[site], site, labels).items():
                    name = f"difference_{len(of)}"
                    tensors[name], of[name] = vector, (site, label)
            save_described(means, "differences", tensors, {"of": of})

    def _record(self, job: Job, sites: Sequence[str], rows: Sequence[tuple[Any, int]]) -> Cache:
        """Activations of labelled prompts, as the probes pool them."""
        chosen = self.fit_tokens
        tokens = (
            chosen
            if isinstance(chosen, list)
            else one_selection(self.cells(job), "a probe is fitted to")
        )
        reduce = self._reduction()
        branch = self.branch if self.branch is not None else job.prompt_branch
        records = [Record(site, branch=branch, tokens=tokens, reduce=reduce) for site in sites]
        return joined_rows(job.record([(item.prompt, seed) for item, seed in rows], records))

    def _reduction(self) -> Any:
        """What is kept of the tokens of each activation."""
        draw, wanted = torch.Generator().manual_seed(0), self.fit_tokens

        def some(x: Tensor) -> Tensor:
            """Random tokens, others of each row."""
            count = min(wanted if isinstance(wanted, int) else x.shape[1], x.shape[1])
            order = torch.rand(x.shape[:2], generator=draw).argsort(1)[:, :count]  # [rows, count]
            return x.gather(1, order.to(x.device).unsqueeze(-1).expand(-1, -1, x.shape[2]))

        if self.probe.pool == "mean":
            return mean_over_tokens
        return some if self.probe.pool == "token" and isinstance(wanted, int) else None


def probe_file(folder: Path, number: int) -> Path:
    return folder / "artifacts" / f"probe-{number}.safetensors"


def _contrasts(recorded: Any, site: str, labels: dict[str, list[str]]) -> dict[str, Tensor]:
    found = {}
    for attribute, names in labels.items():
        means = LabelMeans()
        means.add({site: recorded}, names)
        for label in means.labels:
            found[f"{attribute}={label}"] = means.contrast(site, label)
    return found


def _random(mlp: Mlp, seed: int) -> Mlp:
    """Random weights and biases, each layer with the norm that it had."""
    draw = torch.Generator().manual_seed(seed)

    def like(value: Tensor) -> Tensor:
        drawn = torch.randn(value.shape, generator=draw)
        return drawn * (value.norm() / drawn.norm())

    weights, biases = (tuple(map(like, each)) for each in (mlp.weights, mlp.biases))
    return replace(mlp, weights=weights, biases=biases)
