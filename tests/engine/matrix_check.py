"""Compares the engine with the truth on one line of the matrix of pipelines."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import dreamreader as dr
from dreamreader.errors import ClockUnknown, DreamreaderError

from .matrix_truth import PROMPTS, SEEDS, Truth, Watcher, truth


class Wrong(AssertionError):
    """The engine gave a value that the hooks did not see."""


@dataclass
class Verdict:
    """What came of each way to use the engine: `right`, `refused: why` or `wrong: why`."""

    ways: dict[str, str] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        said = self.ways.values()
        for kind in ("wrong", "refused"):
            if any(each.startswith(kind) for each in said):
                return kind
        return "right"

    @property
    def reasons(self) -> list[str]:
        return [f"{way} {said}" for way, said in self.ways.items() if said != "right"]


def check(
    pipe: Any,
    arguments: dict[str, Any],
    sites: Sequence[str],
    names: Sequence[str] = (),
    unused: int = 0,
) -> Verdict:
    """Record and edit with the engine, in its own run and in blocks; compare every value."""

    def call(prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        torch.manual_seed(0)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompt=list(prompts), generator=generators, **copy.deepcopy(arguments))

    def run(**requests: Any) -> Any:
        seeds = list(SEEDS)
        return dr.Reader(pipe).run(PROMPTS, seeds=seeds, **requests, **copy.deepcopy(arguments))

    true = truth(pipe, call, sites, names, unused)
    ways: dict[str, Callable[[], None]] = {
        "record in run": lambda: _record_run(pipe, run, sites, true),
        "record in block": lambda: _record_block(pipe, call, sites, true),
        "edit in run": lambda: _edit_run(pipe, run, sites[0], true),
        "edit in block": lambda: _edit_block(pipe, call, sites[0], true),
        "one by one": lambda: _one_by_one(run),
    }
    return Verdict({name: _said(way) for name, way in ways.items()})


def _one_by_one(run: Callable[..., Any]) -> None:
    """Rows in batches of one are the rows of one batch, to the tolerance of another batch size."""
    together, apart = run().images, run(batch_size=1).images
    together, apart = (torch.as_tensor(each) for each in (together, apart))
    if together.shape != apart.shape:
        raise Wrong(f"{list(apart.shape)} one by one, {list(together.shape)} together")
    if not torch.allclose(together, apart, rtol=1e-3, atol=1e-3 * float(together.abs().max())):
        raise Wrong(f"other pictures: {(together - apart).abs().amax().item()} apart")


def _said(way: Callable[[], None]) -> str:
    try:
        way()
    except DreamreaderError as error:
        return f"refused: {error}"
    except Exception as error:  # anything else is no answer to a user
        return f"wrong: {type(error).__name__}: {error}"
    return "right"


def _record_run(pipe: Any, run: Callable[..., Any], sites: Sequence[str], true: Truth) -> None:
    with Watcher(pipe, sites).watching() as watcher:
        found = run(record=list(sites))
    if len(watcher.calls) != len(true.run.calls):
        true = true.by_rows(watcher)
    _compare(found.cache, sites, true)


def _record_block(pipe: Any, call: Callable[..., Any], sites: Sequence[str], true: Truth) -> None:
    with dr.Reader(pipe).recording(list(sites)) as cache:
        call(PROMPTS, SEEDS)
    _compare(cache, sites, true)


def _compare(cache: Any, sites: Sequence[str], true: Truth) -> None:
    for site in sites:
        found = cache[site]
        if [each.prompt for each in found.rows] != PROMPTS:
            raise Wrong(f"{site}: rows {found.rows}")
        if found.branches == ("unknown",):
            raise ClockUnknown(f"{site}: recorded under a branch that is told to be unknown")
        if sorted(found.branches) != true.branches:
            raise Wrong(f"{site}: branches {found.branches}, by hand {true.branches}")
        steps = [each.step for each in found.steps]
        if steps != sorted({each.step for each in true.entries}):
            raise Wrong(f"{site}: steps {steps}")
        for at in true.entries:
            moment = found.steps[steps.index(at.step)]
            if moment.timestep != true.run.times[at.step]:
                raise Wrong(f"{site}: step {at.step} at {moment}, {true.run.times}")
            value = found.select(branch=at.branch, rows=[at.row], step=at.step).tensor
            wanted = true.value(site, at)
            if not torch.equal(value.flatten(), wanted.flatten()):
                raise Wrong(f"{site}: values of {at}: {list(value.shape)}, {list(wanted.shape)}")
        count = len(found.rows) * len(found.branches) * len(found.steps)
        if count != len(true.entries):
            raise Wrong(f"{site}: {count} values, by hand {len(true.entries)}")


def _steer(site: str, true: Truth) -> tuple[Any, torch.Tensor, str, int]:
    """A push of row 1 in one branch at the last step."""
    branch = true.branches[-1]
    width = true.value(site, true.entries[0]).shape[-1]
    push = torch.linspace(1.0, 2.0, width)
    edit = dr.Steer(site, push, branch=branch, steps=[true.last_step], rows=[1])
    return edit, push, branch, true.last_step


def _edit_run(pipe: Any, run: Callable[..., Any], site: str, true: Truth) -> None:
    edit, push, branch, step = _steer(site, true)
    with Watcher(pipe, [site]).watching() as watcher:
        run(edits=edit)
    if len(watcher.calls) != len(true.run.calls):
        with Watcher(pipe, [site]).watching() as plain:
            run()
        true = true.by_rows(plain)
    _compare_edit(watcher, site, true, push, branch, step)


def _edit_block(pipe: Any, call: Callable[..., Any], site: str, true: Truth) -> None:
    edit, push, branch, step = _steer(site, true)
    with dr.Reader(pipe).editing(edit), Watcher(pipe, [site]).watching() as watcher:
        call(PROMPTS, SEEDS)
    _compare_edit(watcher, site, true, push, branch, step)


def _compare_edit(
    watcher: Watcher, site: str, true: Truth, push: torch.Tensor, branch: str, step: int
) -> None:
    after = Truth(watcher, true.entries)
    for at in true.entries:
        old, new = true.value(site, at), after.value(site, at)
        if (at.branch, at.step, at.row) == (branch, step, 1):
            if not torch.allclose(new - old, push.to(old).expand_as(old), atol=1e-3):
                raise Wrong(f"{site}: the edit did not reach {at}")
        elif not torch.equal(new, old):
            raise Wrong(f"{site}: the edit of {branch}, step {step}, row 1 changed {at}")
