"""Calls of a denoiser made again, gradients at sites and steps through a function."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from dreamreader.edits import Scale, Steer
from dreamreader.engine import Evaluation, Reader, Record, stepping
from dreamreader.errors import InvalidInput, NeverFired

SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
SETTINGS: dict[str, Any] = {"seeds": 0, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(tiny.pipeline("sd"))


def sample(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


def test_a_call_made_again_gives_what_it_gave_and_what_it_gives_without_edits(
    reader: Reader,
) -> None:
    edit = Scale(SITE, 3.0, steps=[1])
    seen = []

    def after(call: Evaluation, output: Any) -> None:
        given = {name: value for name, value in call.arguments.items() if name != "return_dict"}
        same, plain = sample(call.again()), sample(call.again(edits=False))
        reader._subject.paused = True  # the oracle: the denoiser itself, without any edit
        expected = reader.subject.unet.forward(**given, return_dict=False)[0]
        reader._subject.paused = False
        assert torch.equal(same, sample(output)) and torch.equal(plain, expected)
        assert call.is_edited == (not torch.equal(same, plain)) == (call.moment.step == 1)
        seen.append((call.component, call.moment.step, call.moment.branches, call.total))

    asked = {"edits": edit, "guidance_scale": 5.0, **SETTINGS}
    with reader.replay(after):
        result = reader.run("a cat", record=Record(SITE), **asked)
    assert seen == [("unet", step, ("uncond", "cond"), 2) for step in (0, 1)]
    assert len(result.cache[SITE].steps) == 2 and dict(result.firing[0].steps) == {1: 1}
    assert torch.equal(result.output, reader.run("a cat", **asked).output)
    assert not reader.subject.unet._forward_hooks and not reader.subject.unet._forward_pre_hooks


def test_a_call_that_is_over_gives_nothing_that_would_be_of_another_time(reader: Reader) -> None:
    calls: list[Evaluation] = []
    [site] = reader.sites(SITE)
    with reader.replay(before=calls.append):
        reader.run("a cat", edits=Scale(SITE, 3.0), **SETTINGS)
    first = calls[0]
    for ask in (
        first.again,
        lambda: first.gradient(site, Tensor.sum),
        lambda: first.moment,
        lambda: first.is_edited,
    ):
        with pytest.raises(InvalidInput, match="of a call of unet that is over: ask for it in"):
            ask()
    wrong: Any = 3
    with pytest.raises(InvalidInput, match="replay: after takes a function of the call, got 3"):
        with reader.replay(wrong):
            pass


def test_arguments_are_those_before_an_edit_of_the_input(reader: Reader) -> None:
    given, edited = [], []
    edit = Scale("unet:in", 0.0, steps=[0])
    with (
        reader.replay(before=lambda call: given.append(call.sample.clone())),
        reader.editing(edit),
    ):
        hook = reader.subject.unet.conv_in.register_forward_pre_hook(
            lambda _, args: edited.append(args[0].clone())
        )
        reader.run("a cat", guidance_scale=1.0, **SETTINGS)
        hook.remove()
    assert given[0].abs().max() > 0 and not edited[0].any()
    assert torch.equal(given[1], edited[1])


def test_what_after_gives_is_the_output(reader: Reader) -> None:
    def zeros(call: Evaluation, output: Any) -> tuple[Tensor]:
        return (torch.zeros_like(sample(output)),)

    with reader.replay(zeros), reader.recording("unet") as cache:
        reader.run("a cat", guidance_scale=1.0, **SETTINGS)
    assert cache["unet"].tensor.any()  # recordings come before
    predictions = []

    def around(step: Any, call: inspect.BoundArguments) -> Any:
        predictions.append(call.arguments["model_output"].clone())
        return step(*call.args, **call.kwargs)

    with stepping(reader.subject.scheduler, around), reader.replay(zeros):
        reader.run("a cat", guidance_scale=1.0, **SETTINGS)
    assert len(predictions) == 2 and not any(each.any() for each in predictions)


def test_the_gradient_is_that_through_the_denoiser(reader: Reader) -> None:
    unet, found = reader.subject.unet, []
    [site] = reader.sites(SITE)
    width = site.tap.module.to_out[0].out_features
    edit = Steer("unet.conv_in", torch.ones(unet.conv_in.out_channels), alpha=0.5)

    def objective(h: Tensor) -> Tensor:
        assert h.shape[-1] == width
        return h.square().mean((1, 2))

    def by_hand(call: Evaluation) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        hooks = [
            unet.conv_in.register_forward_hook(lambda m, i, y: y + 0.5),
            site.tap.module.register_forward_hook(lambda m, i, y: kept.append(y)),
        ]
        try:
            reader._subject.paused = True
            with torch.enable_grad():
                x = call.sample.detach().clone().requires_grad_()
                unet.forward(x, *call.args[1:], **call.kwargs)
                value = kept[0].square().mean((1, 2))
                return value.detach(), torch.autograd.grad(value.sum(), x)[0]
        finally:
            reader._subject.paused = False
            for each in hooks:
                each.remove()

    def after(call: Evaluation, output: Any) -> None:
        found.append((call.gradient(site, objective), by_hand(call)))

    with reader.replay(after, denoiser="unet"):
        reader.run(
            ["a cat", "a dog"], edits=edit, guidance_scale=1.0, **SETTINGS | {"seeds": [0, 1]}
        )
    assert len(found) == 2
    for (value, grad), (expected_value, expected) in found:
        assert grad.any() and torch.allclose(value, expected_value, rtol=1e-5)
        assert torch.allclose(grad, expected, rtol=1e-4, atol=1e-7 * float(expected.abs().max()))


def test_what_cannot_be_made_again_is_refused(reader: Reader) -> None:
    with pytest.raises(InvalidInput, match="calls of a denoiser need a pipeline, got Linear"):
        with Reader(nn.Linear(2, 2)).replay():
            pass
    with pytest.raises(InvalidInput, match="has no denoiser 'vae'; it has unet"):
        with reader.replay(denoiser="vae"):
            pass
    [outside] = reader.sites("vae.decoder")
    with pytest.raises(InvalidInput, match="vae.decoder was not reached in the denoiser"):
        with reader.replay(lambda call, output: call.gradient(outside, Tensor.sum)):
            reader.run("a cat", **SETTINGS)
    assert not reader._subject.rehearsing


NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_gradients_at_sites_are_those_of_autograd() -> None:
    x, push = torch.randn(2, 5, 3), torch.randn(4)
    with Reader(NET).gradients(["0", "1"], edits=Steer("0", push, alpha=2.0)) as found:
        y = NET(x)
        NET(x[:1])
        y.square().sum().backward()
    with torch.no_grad():
        first = NET[0](x) + 2.0 * push
    first.requires_grad_()
    second = NET[1](first)
    expected = torch.autograd.grad(NET[2](second).square().sum(), (first, second))
    for site, value, gradient in zip("01", (first, second), expected, strict=True):
        call, other = found[site]
        assert torch.equal(call.value, value.detach()) and other.gradient is None
        assert call.gradient is not None and torch.allclose(call.gradient, gradient, rtol=1e-5)


def test_gradients_leave_values_and_parameters_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).requires_grad_(False)
    x = torch.randn(1, 5, 3)
    with Reader(net).gradients("1") as found:
        y = net(x)
        y.sum().backward(retain_graph=True)
        y.sum().backward()  # adds up
    assert torch.equal(y, net(x)) and all(each.grad is None for each in net.parameters())
    weight = net[2].weight.sum(0).expand(1, 5, 4)
    assert torch.allclose(found["1"][0].gradient, 2 * weight)  # pyright: ignore


def test_gradients_say_what_is_missing() -> None:
    reader = Reader(NET)
    with pytest.raises(InvalidInput, match="1: its gradient is asked for, but gradients are off"):
        with reader.gradients("1"), torch.no_grad():
            NET(torch.randn(1, 5, 3))
    with pytest.raises(NeverFired, match=r"Leaf\(1\) never fired at 1"):
        with reader.gradients("1"):
            pass


class _Halving:
    def step(self, model_output: float, timestep: int, scale: float = 1.0) -> float:
        return scale * model_output / 2


def test_a_scheduler_steps_through_functions_and_is_as_before() -> None:
    scheduler: Any = _Halving()
    own = inspect.signature(scheduler.step)
    seen = []

    def around(step: Any, call: inspect.BoundArguments) -> float:
        seen.append(dict(call.arguments))
        return step(*call.args, **call.kwargs) + 1

    with stepping(scheduler, around):
        assert inspect.signature(scheduler.step) == own
        with stepping(scheduler, lambda step, call: 10 * step(*call.args, **call.kwargs)):
            assert scheduler.step(4, timestep=0, scale=3.0) == 70
        assert scheduler.step(4, 0) == 3
    assert seen[0] == {"model_output": 4, "timestep": 0, "scale": 3.0} and len(seen) == 2
    assert "step" not in vars(scheduler) and scheduler.step(4, 0) == 2
    given = SimpleNamespace(step=scheduler.step)
    with pytest.raises(ZeroDivisionError), stepping(given, lambda step, call: 1 / 0):
        given.step(4, 0)
    assert given.step == scheduler.step


def test_a_reader_says_what_it_reads(reader: Reader) -> None:
    assert reader.kind == "pipeline" and list(reader.denoisers) == ["unet"]
    assert reader.components["unet"] is reader.subject.unet
    assert reader.modules["unet.mid_block"] is reader.subject.unet.mid_block
    plain = Reader(NET)
    assert (plain.kind, plain.name, plain.denoisers) == ("module", "Sequential", {})
    assert plain.components[""] is NET and plain.modules["0"] is NET[0]
    assert plain.shape_of("0") is None
    with plain.recording("0"):
        NET(torch.randn(2, 5, 3))
    assert plain.shape_of("0") == (2, 5, 4)
