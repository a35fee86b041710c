"""The clock is a guest: it changes no value, bears what others installed, leaves no trace."""

import copy
import time

import diffusers
import pytest
import torch

from dreamreader.engine._clock import Clock, DenoiserCall
from dreamreader.engine._clock_run import own_class
from dreamreader.errors import ClockUnknown

from .. import tiny
from .clock_log import Log, call, logged

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


def used(name: str):
    """A pipeline that has run once, and so has the attributes that its own runs give it."""
    pipe = tiny.pipeline(name)
    call(name, pipe, num_inference_steps=2)
    return pipe


def traces(pipe) -> dict:
    """Everything a listener could have left: classes, attributes and hooks."""
    found = {
        "class": type(pipe),
        "attributes": set(vars(pipe)),
        "scheduler": set(vars(pipe.scheduler)),
    }
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            found[name] = type(part), set(vars(part)), [len(vars(part)[hook]) for hook in HOOKS]
    return found


@pytest.mark.parametrize("name", ["sd", "flux-true-cfg", "lumina2", "sdxl-img2img"])
def test_same_bits_and_no_trace(name: str) -> None:
    pipe = tiny.pipeline(name)
    plain, before = call(name, pipe), traces(pipe)
    with Clock(pipe) as clock, Log(clock) as log:
        assert torch.equal(call(name, pipe), plain)
    assert log.moments
    assert traces(pipe) == before
    assert torch.equal(call(name, pipe), plain)


@pytest.mark.parametrize("name", ["sd", "qwen-image"])
def test_no_trace_after_an_exception(name: str) -> None:
    pipe = used(name)
    before = traces(pipe)

    def fail(*_):
        raise RuntimeError("in the denoiser")

    with pytest.raises(RuntimeError, match="in the denoiser"):
        with Clock(pipe) as clock:
            denoiser = next(iter(clock.denoisers.values()))
            handle = denoiser.register_forward_hook(fail)
            try:
                call(name, pipe)
            finally:
                handle.remove()
    assert traces(pipe) == before


def test_foreign_hooks_survive_and_find_the_call_running() -> None:
    pipe = tiny.pipeline("sd")
    steps: dict[str, list[int]] = {"before": [], "root": [], "late": []}
    with Clock(pipe) as clock:
        hooks = [
            pipe.unet.register_forward_pre_hook(
                lambda *_: steps["before"].append(clock.now().step)
            ),
            pipe.unet.register_forward_hook(lambda *_: steps["root"].append(clock.now().step)),
        ]
        call("sd", pipe, num_inference_steps=2)
        # registered after a run, so behind the clock's own hook
        hooks.append(
            pipe.unet.register_forward_hook(lambda *_: steps["late"].append(clock.now().step))
        )
        call("sd", pipe, num_inference_steps=2)
        pipe.vae.decoder.register_forward_hook(lambda *_: pytest.fail("not part of the test"))
    assert steps == {"before": [0, 1, 0, 1], "root": [0, 1, 0, 1], "late": [0, 1]}
    assert len(pipe.unet._forward_hooks) == 2 and len(pipe.unet._forward_pre_hooks) == 1
    for hook in hooks:
        hook.remove()


def test_a_hook_older_than_the_clock_finds_the_call_running() -> None:
    pipe = tiny.pipeline("sd")
    steps = []
    pipe.unet.register_forward_pre_hook(lambda *_: steps.append(clock.now().step))
    with Clock(pipe) as clock:
        call("sd", pipe, num_inference_steps=2)
    assert steps == [0, 1]


def test_a_call_that_failed_is_over() -> None:
    pipe = tiny.pipeline("sd")
    with Clock(pipe) as clock:
        with pytest.raises(TypeError):
            pipe.unet(torch.zeros(1, 4, 8, 12))
        with pytest.raises(ClockUnknown, match="no denoiser"):
            clock.now()


def test_nothing_runs_while_the_picture_is_decoded() -> None:
    pipe = tiny.pipeline("sd")
    errors = []

    def ask(*_):
        with pytest.raises(ClockUnknown, match="no denoiser") as info:
            clock.now()
        errors.append(info.value)

    with Clock(pipe) as clock:
        pipe.vae.decoder.register_forward_hook(ask)
        call("sd", pipe, output_type="pt")
    assert len(errors) == 1


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_clocks_on_one_pipeline_leave_in_any_order(first_out: int) -> None:
    pipe = used("flux-true-cfg")
    before = traces(pipe)
    clocks = [Clock(pipe).__enter__(), Clock(pipe).__enter__()]
    with Log(clocks[0]) as one, Log(clocks[1]) as two:
        call("flux-true-cfg", pipe, num_inference_steps=2)
    assert one.moments == two.moments and len(one.moments) == 4
    clocks[first_out].__exit__()
    rest = clocks[1 - first_out]
    with Log(rest) as log:
        call("flux-true-cfg", pipe, num_inference_steps=2)
    assert log.moments == one.moments
    rest.__exit__()
    assert traces(pipe) == before


def test_only_this_object_is_listened_to() -> None:
    one, other = tiny.pipeline("sd"), tiny.pipeline("sd")
    with Clock(one):
        assert isinstance(one, type(other)) and type(one).__name__ == type(other).__name__
        assert own_class(one) is type(other) is own_class(other)
        assert one.components.keys() == other.components.keys()
    assert type(one) is type(other)


def test_a_run_within_a_run() -> None:
    pipe = tiny.pipeline("sd")
    pipe.scheduler = copy.deepcopy(pipe.scheduler)

    def again(outer, turn, time, tensors):
        if turn == 0:
            kept, outer.scheduler = outer.scheduler, copy.deepcopy(outer.scheduler)
            scale = outer._guidance_scale
            call("sd", outer, ["a cat", "a dog"], num_inference_steps=2, guidance_scale=1.0)
            outer.scheduler, outer._guidance_scale = kept, scale
        return tensors

    said = logged("sd", pipe, num_inference_steps=3, callback_on_step_end=again)
    assert [isinstance(each, ClockUnknown) for each in said] == [False, True, True, False, False]
    own = [each for each in said if isinstance(each, DenoiserCall)]
    assert [(m.step, len(m.branches)) for m in own] == [(0, 2), (1, 2), (2, 2)]


def test_closed_within_a_run() -> None:
    pipe = used("sd")
    before = traces(pipe)
    clock = Clock(pipe).__enter__()

    def close(outer, turn, time, tensors):
        clock.__exit__()
        return tensors

    call("sd", pipe, callback_on_step_end=close)
    assert traces(pipe) == before


def test_opened_within_a_run_knows_nothing_of_it() -> None:
    pipe = tiny.pipeline("sd")
    said = []

    def open_and_ask(outer, turn, time, tensors):
        if turn == 0:
            clock = Clock(outer).__enter__()
            said.extend((clock, Log(clock)))
        return tensors

    call("sd", pipe, callback_on_step_end=open_and_ask)
    clock, log = said
    with log, clock:
        pass
    assert all("outside a run" in str(error) for error in log.said) and len(log.said) == 3


def compiled(pipe, how: str):
    """(pipe with a compiled denoiser, number of compilations so far)"""
    count = [0]

    def backend(graph, inputs):
        count[0] += 1
        return graph.forward

    name = "unet" if hasattr(pipe, "unet") else "transformer"
    if how == "wrapped":
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend=backend))
    else:
        getattr(pipe, name).compile(backend=backend)
    return pipe, count


class _AskingClock(Clock):
    """Asks itself at the end of every call; hooks inside a compiled module are not heard."""

    def __init__(self, pipe, heard: list):
        super().__init__(pipe)
        self.heard = heard

    def _end_call(self) -> None:
        self.heard.append(self.now())
        super()._end_call()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_denoisers(how: str) -> None:
    name = "flux-true-cfg"
    torch._dynamo.reset()
    plain = logged(name, tiny.pipeline(name), num_inference_steps=2)
    pipe, count = compiled(tiny.pipeline(name), how)
    warm = call(name, pipe, num_inference_steps=2)
    before, compilations = traces(pipe), count[0]
    heard = []
    with _AskingClock(pipe, heard):
        assert torch.equal(call(name, pipe, num_inference_steps=2), warm)
    assert heard == plain
    assert traces(pipe) == before
    assert count[0] == compilations, "listening compiled the denoiser again"


@pytest.mark.parametrize("name", ["flux-true-cfg", "qwen-image"])
def test_with_a_step_cache_that_skips_blocks(name: str) -> None:
    plain = logged(name, tiny.pipeline(name))
    pipe = tiny.pipeline(name)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    cached = call(name, pipe)
    with Clock(pipe) as clock, Log(clock) as log:
        assert torch.equal(call(name, pipe), cached)
    assert log.moments == plain
    # switched on while the clock listens
    pipe.transformer.disable_cache()
    with Clock(pipe) as clock, Log(clock) as log:
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
        assert torch.equal(call(name, pipe), cached)
    assert log.moments == plain
    pipe.transformer.disable_cache()


def test_with_group_offloading() -> None:
    plain = logged("sd3", tiny.pipeline("sd3"))
    pipe = tiny.pipeline("sd3")
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    assert logged("sd3", pipe) == plain


def test_cost_per_call() -> None:
    """A coarse bound: tens of microseconds, where the smallest real denoiser takes milliseconds.

    Of this thread's own time, and of the quicker calls: others on the machine slow down the rest.
    """
    pipe = tiny.pipeline("flux-true-cfg")
    costs = []

    class Timed(Clock):
        def _hear(self, name):
            began = super()._hear(name)

            def timed(args, kwargs):
                start = time.thread_time()
                began(args, kwargs)
                self.now()
                costs.append(time.thread_time() - start)

            return timed

    with Timed(pipe):
        call("flux-true-cfg", pipe, num_inference_steps=20)
    assert len(costs) == 40 and sorted(costs)[len(costs) // 4] < 200e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["sd", "flux-true-cfg", "lumina2", "sd3"])
def test_no_wait_for_the_device_within_a_run(name: str) -> None:
    pipe = tiny.pipeline(name).to("cuda")
    said = []

    class Strict(Clock):
        def _hear(self, name):
            began = super()._hear(name)

            def strict(args, kwargs):
                # the schedule is read at the first call of a run
                torch.cuda.set_sync_debug_mode("error" if said else "default")
                try:
                    began(args, kwargs)
                    said.append(self.now())
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            return strict

    with Strict(pipe):
        call(name, pipe)
    assert [moment.step for moment in said][-1] == 3
