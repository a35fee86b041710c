"""The probes of a guidance run: fitted from one recording of prompts, kept in its folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dreamreader.edits import Mlp
from dreamreader.engine import Cache, Record
from dreamreader.experiments.methods.base import one_selection
from dreamreader.probes import Probe, fit
from dreamreader.recording.labelled import joined_rows, mean_over_tokens
from dreamreader.specs.parts import listed_seeds
from dreamreader.steering import LabelMeans

if TYPE_CHECKING:
    from dreamreader.experiments.job import Job
    from dreamreader.experiments.methods.guide import Guide


@dataclass(eq=False)
class Fitted:
    """Probes and means of labels, by site.

    Attributes:
        probes: of each site. differences: what a label's mean has beside those of the others, by
            site and label, [steps, features].
    """

    probes: dict[str, Probe]
    differences: dict[str, dict[str, Tensor]]

    def mlps(self, sites: Sequence[str], random: bool) -> dict[str, Any]:
        """What `ProbeGuidance` takes: the perceptrons by site, or random ones of the same norms."""
        found: dict[str, Any] = {}
        for number, site in enumerate(sites):
            probe = self.probes[site]
            own = [_random(each, 7 + number) for each in probe.mlps] if random else probe.mlps
            found[site] = list(own) if probe.steps else own[0]
        return found

    def contrast(self, site: str, label: str) -> Tensor:
        return self.differences[site][label]


def fitted(method: "Guide", job: "Job") -> Fitted:
    """The probes of a run folder; those that are missing are fitted and written there."""
    assert job.folder is not None
    sites = list(dict.fromkeys(site for cell in method.cells(job) for site in cell.sites))
    files = {site: probe_file(job.folder.path, number) for number, site in enumerate(sites)}
    means = job.folder.path / "artifacts" / "differences.safetensors"
    if not (means.is_file() and all(file.is_file() for file in files.values())):
        _fit(method, job, files, means)
    from dreamreader._tensor_files import load_described

    content, tensors = load_described(means, "differences")
    differences: dict[str, dict[str, Tensor]] = {}
    for name, (site, label) in content["of"].items():
        differences.setdefault(site, {})[label] = tensors[name]
    return Fitted({site: Probe.load(file) for site, file in files.items()}, differences)


def probe_file(folder: Path, number: int) -> Path:
    return folder / "artifacts" / f"probe-{number}.safetensors"


def _fit(method: "Guide", job: "Job", files: dict[str, Path], means: Path) -> None:
    from dreamreader._files import explained
    from dreamreader._tensor_files import save_described

    items = method.fit_items()
    rows = [(item, seed) for item in items for seed in listed_seeds(method.fit_seeds)]
    cache = _recorded(method, job, list(files), rows)
    prompts = [item for item, _ in rows]
    labels = {attribute: method.column_of(prompts, attribute) for attribute in method.labels}
    assert job.folder is not None
    with explained(job.folder.path):
        means.parent.mkdir(parents=True, exist_ok=True)
        for site, file in files.items():
            options = {**method.probe.options, "subject": job.spec.subject.model}
            probe = fit(cache[site], labels, **options)
            probe.save(file)
        tensors, of = {}, {}
        for site in files:
            for label, vector in _contrasts(cache[site], site, labels).items():
                name = f"difference_{len(of)}"
                tensors[name], of[name] = vector, (site, label)
        save_described(means, "differences", tensors, {"of": of})


def _recorded(
    method: "Guide", job: "Job", sites: Sequence[str], rows: Sequence[tuple[Any, int]]
) -> Cache:
    """Activations of labelled prompts, as the probes pool them."""
    chosen = method.fit_tokens
    tokens = (
        chosen
        if isinstance(chosen, list)
        else one_selection(method.cells(job), "a probe is fitted to")
    )
    reduce = _reduction(method)
    branch = method.branch if method.branch is not None else job.prompt_branch
    records = [Record(site, branch=branch, tokens=tokens, reduce=reduce) for site in sites]
    return joined_rows(job.record([(item.prompt, seed) for item, seed in rows], records))


def _contrasts(recorded: Any, site: str, labels: dict[str, list[str]]) -> dict[str, Tensor]:
    found = {}
    for attribute, names in labels.items():
        means = LabelMeans()
        means.add({site: recorded}, names)
        for label in means.labels:
            found[f"{attribute}={label}"] = means.contrast(site, label)
    return found


def _reduction(method: "Guide") -> Any:
    """What is kept of the tokens of each activation."""
    draw, wanted = torch.Generator().manual_seed(0), method.fit_tokens

    def some(x: Tensor) -> Tensor:
        """Random tokens, others of each row."""
        count = min(wanted if isinstance(wanted, int) else x.shape[1], x.shape[1])
        order = torch.rand(x.shape[:2], generator=draw).argsort(1)[:, :count]  # [rows, count]
        return x.gather(1, order.to(x.device).unsqueeze(-1).expand(-1, -1, x.shape[2]))

    if method.probe.pool == "mean":
        return mean_over_tokens
    return some if method.probe.pool == "token" and isinstance(wanted, int) else None


def _random(mlp: Mlp, seed: int) -> Mlp:
    """Random weights and biases, each layer with the norm that it had."""
    draw = torch.Generator().manual_seed(seed)

    def like(value: Tensor) -> Tensor:
        drawn = torch.randn(value.shape, generator=draw)
        return drawn * (value.norm() / drawn.norm())

    weights, biases = (tuple(map(like, each)) for each in (mlp.weights, mlp.biases))
    return replace(mlp, weights=weights, biases=biases)
