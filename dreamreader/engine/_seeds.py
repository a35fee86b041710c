"""Randomness of a run: a picture depends on the seed of its row, whatever else is in its batch.

Every row has a generator of its own, but some schedulers and modules draw from the global ones
instead, or from private ones that they keep. A batch of one row gets those seeded from its row. A
batch of several cannot share them: the first draw is noticed and ends it, and its rows run one by
one. What draws from the system's entropy is refused where that can be noticed.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dreamreader.engine._clock_run import listen_to_calls
from dreamreader.engine._generators import (
    GeneratorSource,
    global_others,
    global_torch,
    private,
    same,
)
from dreamreader.errors import InvalidInput

_SMALL = 2**32  # seeds that people write; those of the system's entropy have 53 bits


class GlobalDraw(Exception):
    """A batch of several rows has drawn from a generator that its rows share.

    `who` says what did it, `what` from which.
    """

    def __init__(self, who: str, what: str):
        super().__init__(who)
        self.who = who
        self.what = what


@contextmanager
def seed_generators(pipe: Any, seed: int) -> Iterator[list[str]]:
    """Seed all generators from one row's seed; they are as before when the block ends.

    Yields a list which has notes when the block has ended.

    Raises:
        InvalidInput: what the run drew may be another thing the next time.
    """
    states, notes = _States(pipe), []
    try:
        for each in states.sources:
            each.seed(_number(each.name, seed))
        yield notes
        _check_new(states, private(pipe, _modules(pipe)), [seed])
        notes += _note_reseeding(seed)
    finally:
        states.restore()


def _number(name: str, seed: int) -> int:
    # not the seed itself: the first draws would repeat the row's own initial noise
    said = f"global generators of row {seed}" + (f", {name}" if name else "")
    digest = hashlib.blake2b(said.encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def _note_reseeding(seed: int) -> list[str]:
    """Whether something gave torch's generator another seed, after which it is not the row's."""
    now = torch.default_generator.initial_seed()
    if now in (seed, _number("", seed)):
        return []
    what = "gave torch's global generator a seed of its own"
    if now >= _SMALL:
        raise InvalidInput(
            f"something in the run {what}, {now}, as torch.seed() does from the system's entropy: "
            "the seed of a row does not decide its picture. Leave it out, or use recording() and "
            "editing()"
        )
    return [f"something in the run {what}, {now}: what it drew then is the same for every row"]


def _check_new(states: "_States", now: Sequence[GeneratorSource], seeds: Sequence[int]) -> None:
    """Refuse generators that were made during the run, other than those of the rows themselves."""
    known = {id(each.own) for each in states.sources}
    for each in now:
        own = each.own
        of_row = isinstance(own, torch.Generator) and own.initial_seed() in seeds
        if id(own) in known or of_row:
            continue
        raise InvalidInput(
            f"{each.name}, was made during the run, so the seed of a row does not decide what it "
            "draws. Make it before the run, or use recording() and editing()"
        )


@contextmanager
def watch_generators(pipe: Any, seeds: Sequence[int]) -> Iterator[list[str]]:
    """Watch all generators while several rows run together.

    Nothing waits for a device: the state of a CUDA generator lives on the host.

    Raises:
        GlobalDraw: at the latest when the next module of the pipeline begins after the draw.
        InvalidInput: what the run drew may be another thing the next time.
    """
    watch = _DrawWatch(pipe)
    try:
        with ExitStack() as stack:
            for name, module in _modules(pipe).items():
                stack.enter_context(
                    listen_to_calls(module, lambda *_: watch.began(), watch.end_of(name, module))
                )
            yield []
        watch.end(seeds)
    except GlobalDraw:
        watch.put_back()
        raise
    finally:
        watch.states.restore()


class _States:
    """The generators of a run and what they were."""

    def __init__(self, pipe: Any):
        self._often = [*global_torch(pipe), *private(pipe, _modules(pipe))]
        self._rarely = global_others()
        self.sources = [*self._often, *self._rarely]
        self._before = {id(each): each.read() for each in self.sources}

    def find_moved(self, all_of_them: bool) -> str | None:
        """A generator that was drawn from; numpy's and Python's own are asked only on demand."""
        for each in self.sources if all_of_them else self._often:
            if not same(each.read(), self._before[id(each)]):
                return each.name or "the global random generators"
        return None

    def restore(self) -> None:
        for each in self.sources:
            each.write(self._before[id(each)])


class _DrawWatch:
    """Compares the states between the calls of the pipeline's modules."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.states = _States(pipe)
        self.denoised = 0
        self._who: str | None = None
        self._processors = _processors(pipe)

    def began(self) -> None:
        """A module begins: what drew since the last one ended was the pipeline or its scheduler."""
        # numpy and Python: before the first denoising step and after it
        self._raise_if_moved(self.denoised < 2)

    def end_of(self, name: str, module: nn.Module) -> Any:
        def end() -> None:
            self.denoised += name in _DENOISERS
            # only noted: an error raised here would hide one that the module itself has raised
            if self._who is None and self.states.find_moved(False):
                self._who = _name_drawer(name, module)

        return end

    def end(self, seeds: Sequence[int]) -> None:
        """The pipeline has returned."""
        self._raise_if_moved(True)
        _check_new(self.states, private(self.pipe, _modules(self.pipe)), seeds)

    def _raise_if_moved(self, all_of_them: bool) -> None:
        what = self.states.find_moved(all_of_them)
        if what is not None:
            raise GlobalDraw(self._who or self._between(), what)

    def put_back(self) -> None:
        """Pipelines with perturbed attention leave their processors behind when they are left."""
        for module, processors in self._processors:
            module.set_attn_processor(dict(processors))

    def _between(self) -> str:
        own = getattr(type(self.pipe), "_dreamreader_own_class", type(self.pipe)).__name__
        if not self.denoised:
            return f"{own}, before its first denoising step"
        scheduler = type(getattr(self.pipe, "scheduler", None)).__name__
        return f"{scheduler}.step (or {own} or a callback, between two calls of the denoiser)"


_DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")


def _modules(pipe: Any) -> dict[str, nn.Module]:
    parts = pipe.components.items()
    return {name: module for name, module in parts if isinstance(module, nn.Module)}


def _name_drawer(name: str, module: nn.Module) -> str:
    """The module that drew: a dropout in train mode where there is one."""
    for path, each in module.named_modules():
        if isinstance(each, nn.modules.dropout._DropoutNd) and each.training and each.p > 0:
            return f"{name}.{path} ({type(each).__name__} in train mode; call {name}.eval())"
    return f"{name} ({type(module).__name__})"


def _processors(pipe: Any) -> list[tuple[Any, dict[str, Any]]]:
    if not hasattr(pipe, "_set_pag_attn_processor"):
        return []
    found: list[Any] = [
        each for each in _modules(pipe).values() if hasattr(each, "attn_processors")
    ]
    return [(each, each.attn_processors) for each in found]
