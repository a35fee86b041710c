"""Generators that a scheduler, a module or a pipeline keeps for itself, and those of the system."""

import random
import threading
from typing import Any

import diffusers
import numpy
import pytest
import torch

import dreamreader as dr
from dreamreader.errors import InvalidInput

from .. import tiny

PROMPTS = ["a red circle", "a blue square"]
SITE = "unet.mid_block"
SHARED = numpy.random.default_rng(3)


class Noisy(diffusers.DDIMScheduler):
    """Adds noise of its own to every step."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        found, *rest = super().step(*args, **kwargs)
        return (found + 0.3 * self.noise(found.shape), *rest)

    def noise(self, shape: Any) -> torch.Tensor:
        raise NotImplementedError


class OfNumpy(Noisy):
    def noise(self, shape: Any) -> torch.Tensor:
        return torch.from_numpy(self.kept[0].standard_normal(tuple(shape))).float()


class OfState(Noisy):
    def noise(self, shape: Any) -> torch.Tensor:
        return torch.from_numpy(self.kept["state"].standard_normal(tuple(shape))).float()


class OfPython(Noisy):
    def noise(self, shape: Any) -> torch.Tensor:
        return torch.full(tuple(shape), self.kept.gauss(0, 1))


class OfTorch(Noisy):
    def noise(self, shape: Any) -> torch.Tensor:
        return torch.randn(shape, generator=self.kept)


class OfModule(Noisy):
    def noise(self, shape: Any) -> torch.Tensor:
        return torch.from_numpy(SHARED.standard_normal(tuple(shape))).float()


class OfSystem(Noisy):
    def noise(self, shape: Any) -> torch.Tensor:
        torch.seed()
        return torch.randn(shape)


class OfConstant(Noisy):
    def noise(self, shape: Any) -> torch.Tensor:
        torch.manual_seed(5)
        return torch.randn(shape)


class Anew(OfTorch):
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.kept = torch.Generator()
        self.kept.seed()


KEPT = {
    OfNumpy: lambda: [numpy.random.default_rng()],
    OfState: lambda: {"state": numpy.random.RandomState()},
    OfPython: random.Random,
    OfTorch: torch.Generator,
    OfModule: lambda: None,
}


def _reader(own: type, kept: Any = None) -> dr.Reader:
    pipe = tiny.pipeline("sd")
    pipe.scheduler = own.from_config(pipe.scheduler.config)
    pipe.scheduler.kept = kept
    return dr.Reader(pipe)


def _settings(**kwargs: Any) -> dict[str, Any]:
    return {**tiny.arguments("sd", 2), "output_type": "latent", **kwargs}


@pytest.mark.parametrize("own", KEPT)
def test_a_private_generator_is_seeded_by_row(own: type) -> None:
    reader = _reader(own, KEPT[own]())
    both = reader.run(PROMPTS, seeds=[4, 7], **_settings())
    width = reader.run(PROMPTS[0], record=SITE, seeds=4, **_settings()).cache[SITE].shape[-1]
    nothing = dr.Steer(SITE, torch.ones(width), alpha=0.0)
    again = reader.run(PROMPTS, edits=nothing, seeds=[4, 7], **_settings())
    alone = reader.run(PROMPTS[1], seeds=7, **_settings())
    assert torch.equal(both.images, again.images)
    assert torch.equal(both.images[1:], alone.images)
    kind = "SHARED" if own is OfModule else "scheduler.kept"
    assert any(f"draws from {kind}" in e or kind in e for e in both.firing.notes)
    assert alone.firing.notes == []


def test_a_private_generator_is_as_before_the_run() -> None:
    kept = numpy.random.default_rng(2)
    before = kept.bit_generator.state
    _reader(OfNumpy, [kept]).run(PROMPTS[0], seeds=4, **_settings())
    assert kept.bit_generator.state == before


def test_a_processor_that_draws_is_named() -> None:
    class Drawing:
        def __init__(self, inner: Any):
            self.inner, self.rng = inner, numpy.random.default_rng()

        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
            return self.inner(attn, *args, **kwargs) * (1 + self.rng.random())

    reader = _reader(diffusers.DDIMScheduler)
    module = next(e for e in reader.subject.unet.modules() if hasattr(e, "processor"))
    module.processor = Drawing(module.processor)
    both = reader.run(PROMPTS, seeds=[4, 7], **_settings())
    assert "processor.rng, a numpy Generator" in both.firing.notes[0]
    alone = reader.run(PROMPTS[1], seeds=7, **_settings())
    assert torch.equal(both.images[1:], alone.images)


def test_entropy_of_the_system_is_refused() -> None:
    for prompts in (PROMPTS[0], PROMPTS):
        with pytest.raises(InvalidInput, match="torch.seed.. does from the system's entropy"):
            _reader(OfSystem).run(prompts, seeds=4, **_settings())
        with pytest.raises(InvalidInput, match="scheduler.kept is a SystemRandom, which draws"):
            _reader(OfPython, random.SystemRandom()).run(prompts, seeds=4, **_settings())
        with pytest.raises(InvalidInput, match="kept, a torch.Generator, was made during the run"):
            _reader(Anew).run(prompts, seeds=4, **_settings())


def test_a_constant_seed_is_noted() -> None:
    reader = _reader(OfConstant)
    found = reader.run(PROMPTS, seeds=[4, 7], **_settings())
    assert any("a seed of its own, 5" in each for each in found.firing.notes)
    assert torch.equal(found.images, reader.run(PROMPTS, seeds=[4, 7], **_settings()).images)


def test_runs_of_several_threads_do_not_share_generators() -> None:
    readers = [_reader(diffusers.EulerAncestralDiscreteScheduler) for _ in range(2)]
    for each in readers:
        each.subject.unet.train()
        for part in each.subject.unet.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.2
    true = [r.run(PROMPTS, seeds=[n, 9], **_settings()) for n, r in enumerate(readers)]
    found: dict[int, Any] = {}

    def run(number: int) -> None:
        found[number] = readers[number].run(PROMPTS, seeds=[number, 9], **_settings())

    before = torch.get_rng_state()
    threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(torch.equal(found[n].images, true[n].images) for n in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
