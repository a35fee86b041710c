"""What a run of any pipeline did, told by plain hooks: row, branch and step of every batch entry.

Nothing here asks dreamreader. The truth comes from running the pipeline again with one input
changed and looking which batch entries of the denoiser's inputs change with it:

- a row is what changes with that row's generator;
- the branches that know the prompt (cond, perturbed, a second image branch) change with the
  prompts; what does not is uncond;
- a step is one call of `scheduler.step`, numbered from the end of `scheduler.timesteps`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "decoder")
PROMPTS = ["a red bird", "a large blue circle"]
OTHERS = ["a red dog", "a large blue square"]  # of the same numbers of tokens
SEEDS = (3, 4)


@dataclass
class Seen:
    """One call of a denoiser: what it was given, and what passed the sites inside."""

    component: str
    steps_done: int
    inputs: dict[str, Tensor]
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        name = next(each for each in ("0", "sample", "hidden_states", "x") if each in self.inputs)
        return self.inputs[name].shape[0]


@dataclass(frozen=True)
class Entry:
    """Where one batch entry of one denoiser call belongs."""

    call: int
    entry: int
    row: int
    branch: str
    step: int


class Watcher:
    """Plain hooks on a pipeline: keeps what every denoiser call was given and gave at some sites.

    The hooks at the sites are put on anew at the start of each denoiser call, so they stand behind
    every hook that was there before and see what it left.
    """

    def __init__(self, pipe: Any, sites: Sequence[str] = ()):
        self.pipe = pipe
        self.sites = sites
        self.calls: list[Seen] = []
        self.steps = 0
        self.times: list[float] = []
        self._inside: list[Any] = []

    @contextmanager
    def watching(self) -> Iterator["Watcher"]:
        handles = []
        for name in DENOISERS:
            module = getattr(self.pipe, name, None)
            if isinstance(module, nn.Module):
                handles.append(
                    module.register_forward_pre_hook(self._begin(name), with_kwargs=True)
                )
                handles.append(module.register_forward_hook(self._end))
        scheduler = self.pipe.scheduler
        step = scheduler.step

        @functools.wraps(step)  # pipelines look at the names of its arguments
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return step(*args, **kwargs)

        scheduler.step = counted
        try:
            yield self
        finally:
            del scheduler.step
            for handle in [*handles, *self._inside]:
                handle.remove()
        self.times = [float(each) for each in scheduler.timesteps]

    def _begin(self, component: str) -> Callable[..., None]:
        def began(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs: dict[str, Tensor] = {}
            for key, value in [*enumerate(args), *kwargs.items()]:
                _flatten(str(key), value, inputs)
            seen = Seen(component, self.steps, inputs)
            self.calls.append(seen)
            for site in self.sites:
                name, _, path = site.partition(".")
                if name == component:
                    inner, side = (
                        module.get_submodule(path.partition(":")[0]),
                        path.partition(":")[2],
                    )
                    self._inside.append(_keep(inner, side, site, seen.values))

        return began

    def _end(self, *_: Any) -> None:
        while self._inside:
            self._inside.pop().remove()


def _keep(module: nn.Module, side: str, site: str, values: dict[str, Tensor]) -> Any:
    """A hook that keeps the output, or for `heads` what enters the output projection."""
    if side == "heads":
        projection = module.to_out[0] if isinstance(module.to_out, nn.ModuleList) else module.to_out
        return projection.register_forward_pre_hook(
            lambda _, args: values.__setitem__(site, args[0].detach().clone())
        )

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        values[site] = first.detach().clone()

    return module.register_forward_hook(keep)


def _flatten(key: str, value: Any, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor) and value.dim():
        found[key] = value.detach().clone()
    elif isinstance(value, list) and key in _LISTS and all(isinstance(e, Tensor) for e in value):
        flat = [each.detach().flatten() for each in value]  # of several lengths, filled with zeros
        found[key] = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
    elif isinstance(value, dict | list | tuple):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _flatten(f"{key}.{name}", inner, found)


_LISTS = ("0", "2", "x", "cap_feats")  # one tensor for each batch entry, as in Z-Image


def changed(one: Seen, two: Seen, ignored: Sequence[str] = ()) -> set[int]:
    """Batch entries whose inputs differ between two calls."""
    found: set[int] = set()
    for key, value in one.inputs.items():
        other = two.inputs.get(key)
        if key in ignored or value.shape[0] % one.batch or other is None:
            continue
        assert value.shape == other.shape, f"{key}: {value.shape} and {other.shape}"
        # of a video, a text may come once for each frame of each entry
        pairs = zip(value.chunk(one.batch), other.chunk(one.batch), strict=True)
        found |= {entry for entry, (x, y) in enumerate(pairs) if not torch.equal(x, y)}
    return found


def _seeded(one: Sequence[Seen], two: Sequence[Seen]) -> set[str]:
    """Inputs that change with the generators: the latents, not the texts."""
    pairs = [
        (key, a.inputs[key], b.inputs.get(key))
        for a, b in zip(one, two, strict=True)
        for key in a.inputs
    ]
    return {key for key, x, y in pairs if y is None or x.shape != y.shape or not torch.equal(x, y)}


Call = Callable[..., Any]
"""(prompts, seeds) -> runs the pipeline on them."""


def truth(
    pipe: Any, call: Call, sites: Sequence[str], names: Sequence[str] = (), unused: int = 0
) -> "Truth":
    """Run the pipeline and find out what every batch entry of every denoiser call is.

    Args:
        names: of the branches that cannot be told apart by what they are given (perturbed
            attention), in the order in which the method is defined; else cond and uncond.
        unused: entries of the schedule behind the last one at which the denoiser is called.
    """

    def run(prompts: list[str], seeds: Sequence[int], kept: Sequence[str] = ()) -> Watcher:
        watcher = Watcher(pipe, kept)
        torch.manual_seed(0)
        with watcher.watching():
            call(prompts, seeds)
        return watcher

    base = run(PROMPTS, SEEDS, sites)
    prompted = run(OTHERS, SEEDS)
    seeded = [
        run(PROMPTS, [9 if n == row else s for n, s in enumerate(SEEDS)])
        for row in range(len(SEEDS))
    ]
    latents = set().union(*(_seeded(base.calls, each.calls) for each in seeded))
    total = len(base.times) - unused
    entries: list[Entry] = []
    for number, seen in enumerate(base.calls):
        rows = [changed(seen, each.calls[number]) for each in seeded]
        told = changed(seen, prompted.calls[number], tuple(latents))
        known: dict[int, int] = {}  # how many passes of this row were met in this call
        for entry in range(seen.batch):
            owners = [row for row, found in enumerate(rows) if entry in found]
            assert len(owners) == 1, f"entry {entry} of call {number} changes with rows {owners}"
            branch = "cond" if entry in told else "uncond"
            if names:
                branch = names[known.get(owners[0], 0)]
                assert (branch in ("cond", "perturbed")) == (entry in told), branch
            known[owners[0]] = known.get(owners[0], 0) + 1
            step = total - base.steps + seen.steps_done
            entries.append(Entry(number, entry, owners[0], branch, step))
    return Truth(base, entries)


@dataclass
class Truth:
    """A run and where its batch entries belong."""

    run: Watcher
    entries: list[Entry]

    @property
    def branches(self) -> list[str]:
        return sorted({each.branch for each in self.entries})

    @property
    def last_step(self) -> int:
        return max(each.step for each in self.entries)

    def by_rows(self, run: Watcher) -> "Truth":
        """The truth of a run that took one row after the other, where this one took both."""
        found, calls = [], len(self.run.calls)
        for row in range(len(SEEDS)):
            places: dict[int, int] = {}
            for at in self.entries:
                if at.row == row:
                    entry = places[at.call] = places.get(at.call, -1) + 1
                    found.append(replace(at, call=row * calls + at.call, entry=entry))
        return Truth(run, found)

    def value(self, site: str, at: Entry) -> Tensor:
        """[tokens, features] of one entry; channels of feature maps stand first in the module."""
        value = self.run.calls[at.call].values[site][at.entry]
        return value.flatten(1).T if maps(site) and value.dim() > 2 else value.flatten(0, -2)


def maps(site: str) -> bool:
    """Whether a site gives feature maps [channels, height, width]: blocks of UNets do."""
    return site.startswith(("unet", "decoder")) and "attn" not in site and ":" not in site
