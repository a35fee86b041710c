"""The embeddings of every call, not only of the first, have to be those of its branches."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch

import dreamreader as dr
from dreamreader.engine._clock import Clock
from dreamreader.errors import ClockUnknown

from .. import tiny
from .clock_log import Log, call

BOTH, COND, UNCOND = ("uncond", "cond"), ("cond",), ("uncond",)


def _said(name: str, change: Callable, *embeddings: str, **kwargs: Any) -> list[Any]:
    """What the clock says at each call where a callback changes embeddings behind step 1."""

    def callback(pipe: Any, turn: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return change(pipe, tensors) or tensors if turn == 1 else tensors

    pipe = tiny.pipeline(name)
    asked = {"callback_on_step_end_tensor_inputs": list(embeddings), **kwargs}
    with Clock(pipe) as clock, Log(clock) as log:
        call(name, pipe, callback_on_step_end=callback, **asked)
    return [getattr(each, "branches", str(each)) for each in log.said]


def _swap(pipe: Any, tensors: dict[str, Any]) -> None:
    tensors["prompt_embeds"] = tensors["prompt_embeds"].flip(0)


def _swap_in_place(pipe: Any, tensors: dict[str, Any]) -> None:
    tensors["prompt_embeds"].copy_(tensors["prompt_embeds"].flip(0))


@pytest.mark.parametrize("change", [_swap, _swap_in_place])
def test_halves_that_a_callback_exchanges_have_no_branch(change: Callable) -> None:
    said = _said("sd", change, "prompt_embeds", negative_prompt="a dog")
    assert said[:2] == [BOTH] * 2
    for each in said[2:]:
        assert "what should be uncond holds the prompt embeddings of cond" in each


@pytest.mark.parametrize(("half", "known"), [(1, True), (0, False)])
def test_guidance_that_ends_goes_on_with_the_half_that_is_kept(half: int, known: bool) -> None:
    def end(pipe: Any, tensors: dict[str, Any]) -> None:
        pipe._guidance_scale = 0.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[half]

    said = _said("sd", end, "prompt_embeds", negative_prompt="a dog")
    assert said[:2] == [BOTH] * 2
    if known:
        assert said[2:] == [COND] * 2
    else:
        assert all("should be cond holds the prompt embeddings of uncond" in e for e in said[2:])


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", ["lumina2", "flux-true-cfg"])
def test_separate_calls_that_a_callback_exchanges_have_no_branch(name: str, copied: bool) -> None:
    pipe, given = tiny.pipeline(name), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )

    def exchange(pipe: Any, turn: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": given[1].clone() if copied else given[1]} if turn == 1 else {}

    with Clock(pipe) as clock, Log(clock) as log:
        call(name, pipe, negative_prompt="a dog", callback_on_step_end=exchange)
    said = [getattr(each, "branches", str(each)) for each in log.said]
    assert said[:4] == [COND, UNCOND] * 2 and len(said) == 8
    for first, second in zip(said[4::2], said[5::2], strict=True):
        assert "should be cond holds the prompt embeddings of uncond" in first
        assert second == UNCOND


def test_other_embeddings_of_a_callback_keep_their_places() -> None:
    def travel(pipe: Any, tensors: dict[str, Any]) -> None:
        tensors["prompt_embeds"] = tensors["prompt_embeds"] * 1.5

    assert _said("sd", travel, "prompt_embeds", negative_prompt="a dog") == [BOTH] * 4


def test_an_edit_of_a_half_whose_place_is_unknown_is_refused() -> None:
    pipe = tiny.pipeline("sd")

    def swap(pipe: Any, turn: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"].flip(0)}

    with pytest.raises(ClockUnknown, match="holds the prompt embeddings of"):
        dr.Reader(pipe).run(
            "a cat",
            record=dr.Record("unet.mid_block", branch="cond"),
            negative_prompt="a dog",
            callback_on_step_end=swap,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
            num_inference_steps=3,
            output_type="latent",
            height=16,
            width=16,
        )


@contextmanager
def _patched(own: type, name: str, function: Any) -> Iterator[None]:
    earlier = vars(own)[name]
    setattr(own, name, function)
    try:
        yield
    finally:
        setattr(own, name, earlier)


def _around(original: Callable) -> Callable:
    @functools.wraps(original)
    def loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    return loop


def test_a_class_whose_call_was_replaced_is_a_stranger() -> None:
    own = diffusers.StableDiffusionPipeline
    pipe = tiny.pipeline("sd")
    with _patched(own, "__call__", _around(own.__call__)):
        with Clock(pipe) as clock, Log(clock) as log:
            call("sd", pipe)
    assert all("its __call__ was replaced by loop of tests" in str(each) for each in log.said)
    with Clock(pipe) as clock, Log(clock) as log:
        call("sd", pipe)
    assert [each.branches for each in log.moments] == [BOTH] * 4


def test_the_call_of_another_class_of_diffusers_is_a_replacement() -> None:
    own = diffusers.StableDiffusionPipeline
    pipe = tiny.pipeline("sd")
    with _patched(own, "__call__", diffusers.StableDiffusionImg2ImgPipeline.__call__):
        with Clock(pipe) as clock:
            clock.run_began({"prompt": "a cat", "guidance_scale": 5.0})
            said = clock._runs[-1].branches._unknown(None)
            clock.run_ended(True)
    assert "replaced by __call__ of diffusers.pipelines.stable_diffusion" in said


def test_values_are_compared_once_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    equal = torch.equal

    def count(*pair: torch.Tensor) -> bool:
        compared.append(pair)
        return equal(*pair)

    pipe = tiny.pipeline("sd")
    monkeypatch.setattr("dreamreader.engine._clock_proof.torch.equal", count)
    counts = []
    for steps in (1, 8):
        compared.clear()
        with Clock(pipe), torch.no_grad():
            call("sd", pipe, num_inference_steps=steps)
        counts.append(sum(pair[0].dim() == 3 for pair in compared))
    assert counts[0] == counts[1] > 0


class Separate(diffusers.StableDiffusionPipeline):
    """A loop of its own, which calls its UNet once per branch; `order` says with what."""

    order = ("cond", "uncond")

    @torch.no_grad()
    def __call__(self, prompt: Any, generator: Any = None, **_: Any) -> tuple[torch.Tensor]:
        negative = "a dog" if isinstance(prompt, str) else ["a dog"] * len(prompt)
        cond, uncond = self.encode_prompt(prompt, "cpu", 1, True, negative)
        self.scheduler.set_timesteps(3)
        texts = {"cond": cond, "uncond": uncond, "copy": cond.clone(), "other": cond * 1.5}
        x = torch.randn(len(cond), 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in self.scheduler.timesteps:
            for each in self.order:
                guess = self.unet(x, t, encoder_hidden_states=texts[each]).sample
            x = self.scheduler.step(guess, t, x).prev_sample
        return (x,)


@pytest.mark.parametrize(
    ("order", "known"),
    [
        (("cond", "uncond"), [COND, UNCOND]),
        (("uncond", "copy"), [UNCOND, COND]),
        (("cond", "copy"), [COND, "twice with the prompt embeddings of cond"]),
        (("cond", "other"), [COND, "how Separate lays out its guidance passes is not known"]),
    ],
)
def test_calls_of_an_unknown_loop_are_told_by_their_embeddings(order: Any, known: Any) -> None:
    pipe = Separate(**tiny.pipeline("sd").components, requires_safety_checker=False)
    pipe.order = order
    for prompts in ("a cat", ["a cat", "a red cat"]):
        with Clock(pipe) as clock, Log(clock) as log:
            pipe(prompts)
        assert len(log.said) == 6
        for said, expected in zip(log.said, known * 3, strict=True):
            if isinstance(expected, str):
                assert expected in str(said)
            else:
                assert said.branches == expected
