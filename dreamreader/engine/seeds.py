"""Randomness of a run: a picture depends on the seed of its row, whatever else is in its batch.

Every row has a generator of its own, but some schedulers and modules draw from the global ones
instead. A batch of one row gets those seeded from its row. A batch of several cannot share them:
the first draw is noticed and ends it, and its rows run one by one.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from torch import nn

from dreamreader.engine.clock_run import listen_to_calls


class GlobalDraw(Exception):
    """A batch of several rows has drawn from a global generator; `who` says what did it."""

    def __init__(self, who: str):
        super().__init__(who)
        self.who = who


@contextmanager
def seeded(pipe: Any, seed: int) -> Iterator[None]:
    """Seed the global generators from one row's seed; they are as before when the block ends."""
    states = _States(pipe)
    # not the seed itself: the first draws would repeat the row's own initial noise
    digest = hashlib.blake2b(f"global generators of row {seed}".encode(), digest_size=8)
    own = int.from_bytes(digest.digest(), "little") >> 1
    try:
        for each in states.generators:
            each.manual_seed(own)
        numpy.random.seed(own % 2**32)
        random.seed(own)
        yield
    finally:
        states.restore()


@contextmanager
def watched(pipe: Any) -> Iterator[None]:
    """Watch the global generators while several rows run together.

    Nothing waits for a device: the state of a CUDA generator lives on the host.

    Raises:
        GlobalDraw: at the latest when the next module of the pipeline begins after the draw.
    """
    watch = _Watch(pipe)
    try:
        with ExitStack() as stack:
            for name, module in _modules(pipe).items():
                stack.enter_context(
                    listen_to_calls(module, lambda *_: watch.began(), watch.ended_of(name, module))
                )
            yield
        watch.ended()
    except GlobalDraw:
        watch.put_back()
        raise
    finally:
        watch.states.restore()


class _States:
    """The global generators and what they were."""

    def __init__(self, pipe: Any):
        self.generators = [torch.default_generator, *_cuda(pipe)]
        self.torch = [each.get_state() for each in self.generators]
        self.numpy = numpy.random.get_state(legacy=False)
        self.python = random.getstate()

    def torch_moved(self) -> bool:
        pairs = zip(self.generators, self.torch, strict=True)
        return any(not torch.equal(each.get_state(), state) for each, state in pairs)

    def others_moved(self) -> bool:
        """Whether numpy's or Python's has; their states are large, so this is asked rarely."""
        now, then = (each["state"] for each in (numpy.random.get_state(legacy=False), self.numpy))
        same = now["pos"] == then["pos"] and numpy.array_equal(now["key"], then["key"])
        return not same or random.getstate() != self.python

    def restore(self) -> None:
        for each, state in zip(self.generators, self.torch, strict=True):
            each.set_state(state)
        numpy.random.set_state(self.numpy)
        random.setstate(self.python)


class _Watch:
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
        if self.states.torch_moved() or (self.denoised < 2 and self.states.others_moved()):
            raise GlobalDraw(self._who or self._between())

    def ended_of(self, name: str, module: nn.Module) -> Any:
        def ended() -> None:
            self.denoised += name in _DENOISERS
            # only noted: an error raised here would hide one that the module itself has raised
            if self._who is None and self.states.torch_moved():
                self._who = _drawing(name, module)

        return ended

    def ended(self) -> None:
        """The pipeline has returned."""
        if self.states.torch_moved() or self.states.others_moved():
            raise GlobalDraw(self._who or self._between())

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


def _drawing(name: str, module: nn.Module) -> str:
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


def _cuda(pipe: Any) -> list[torch.Generator]:
    """Generators of every CUDA device, where one is in use or is about to be."""
    if not torch.cuda.is_available():
        return []
    device = getattr(pipe, "_execution_device", None) or getattr(pipe, "device", None)
    if not torch.cuda.is_initialized() and getattr(device, "type", None) != "cuda":
        return []
    torch.cuda.init()
    return list(torch.cuda.default_generators)
