"""Wrong input: each a clear error; hooks are gone afterwards and the subject is as before."""

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch

from dreamreader.edits import Edit, Scale, Steer
from dreamreader.engine import Reader, Record
from dreamreader.engine._taps import pick
from dreamreader.errors import DreamreaderError, InvalidInput, NeverFired, UnknownName

SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
V = torch.ones(32)
KW = {"output_type": "latent", **tiny.arguments("sd", 2)}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline("sd")


@pytest.fixture(scope="module")
def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.unet.state_dict().items()}


@pytest.fixture
def reader(pipe: Any, weights: dict[str, torch.Tensor]) -> Iterator[Reader]:
    own = type(pipe)
    yield Reader(pipe)
    assert type(pipe) is own
    for component in (pipe.unet, pipe.text_encoder, pipe.vae):
        for name, module in component.named_modules():
            hooks = [*module._forward_hooks, *module._forward_pre_hooks]
            assert not hooks, f"{name} still has hooks"
            assert "forward" not in vars(module) and "cache_context" not in vars(module)
    now = pipe.unet.state_dict()
    assert all(torch.equal(now[name], value) for name, value in weights.items())


CASES: list[tuple[dict[str, Any], type[DreamreaderError], str]] = [
    ({"prompts": []}, InvalidInput, "prompts is empty: at least one prompt is needed"),
    ({"prompts": ["a", 3]}, InvalidInput, "prompts must be strings, got int 3"),
    (
        {"prompts": ["a", "b"], "seeds": [1, 2, 3]},
        InvalidInput,
        "rows do not fit: prompts has 2, seeds has 3; each needs 1 or 3",
    ),
    ({"seeds": []}, InvalidInput, "seeds is empty"),
    ({"seeds": [1.5]}, InvalidInput, "a seed is an int, got 1.5"),
    ({"seeds": -1}, InvalidInput, "a seed is between 0 and"),
    (
        {"prompts": ["a", "b"], "edits": Steer(SITE, V, [1.0, 2.0, 3.0])},
        InvalidInput,
        r"rows do not fit: prompts has 2, alpha of edit 0 \(Steer\) has 3; each needs 1 or 3",
    ),
    (
        {"edits": Steer(SITE, torch.ones(31))},
        InvalidInput,
        rf"direction at {SITE}: the site has 32 features, direction is \[31\]",
    ),
    (
        {"edits": Steer(f"{SITE}:heads", torch.ones(31))},
        InvalidInput,
        r"has 32 features \(2 heads of 16\), direction is \[31\]",
    ),
    ({"edits": Steer(SITE, torch.ones(32).long())}, InvalidInput, "floating point is needed"),
    (
        {"edits": Steer("unet.mid_block.attentions.1", V)},
        UnknownName,
        "unknown site 'unet.mid_block.attentions.1'; nearest: unet.mid_block.attentions",
    ),
    (
        {"edits": Steer("unett.mid_block", V)},
        UnknownName,
        "unknown site 'unett.mid_block'; nearest: unet.mid_block.*Paths start with text_encoder, "
        "unet, vae",
    ),
    ({"record": "unet.**.atn2"}, UnknownName, r"unknown site 'unet.\*\*.atn2'"),
    (
        {"edits": Scale("vae.encoder.conv_in", 2.0)},
        NeverFired,
        "Scale.vae.encoder.conv_in. never fired at vae.encoder.conv_in: the module was not "
        "called in this run.*nearest sites",
    ),
    ({"record": "vae.encoder.conv_in"}, NeverFired, "the module was not called in this run"),
    (
        {"edits": Steer(SITE, V, steps=slice(5, 9))},
        NeverFired,
        "can never fire: this run has steps 0 .. 1 .timestep",
    ),
    (
        {"edits": Steer(SITE, V, branch="positive")},
        UnknownName,
        "unknown branch 'positive'.*this run had uncond, cond",
    ),
    ({"record": [SITE, SITE]}, InvalidInput, "is recorded twice"),
    ({"num_inference_step": 3}, UnknownName, "nearest: num_inference_steps"),
    ({"generator": None}, InvalidInput, "generator is set by the reader: use prompts and seeds"),
    ({"num_images_per_prompt": 2}, InvalidInput, r"give seeds=range\(2\) or repeat the prompt"),
    (
        {"prompts": ["a", "b", "c"], "negative_prompt": ["x", "y"]},
        InvalidInput,
        "negative_prompt has 2 entries, the run has 3 rows",
    ),
    ({"batch_size": 0}, InvalidInput, "batch_size is a whole number of at least 1, got 0"),
    ({"batch_size": 1.5}, InvalidInput, "batch_size is a whole number of at least 1, got 1.5"),
    ({"batch_size": "a"}, InvalidInput, "batch_size is a whole number of at least 1, got 'a'"),
    ({"memory_limit": "a"}, InvalidInput, "memory_limit is a number of bytes, got 'a'"),
    ({"memory_limit": -1}, InvalidInput, "memory_limit is a number of bytes, got -1"),
    ({"prompts": None}, InvalidInput, "prompts: a prompt or a list .* is needed, got None"),
    ({"prompts": 5}, InvalidInput, "prompts: a prompt or a list .* is needed, got 5"),
    ({"prompts": {"a"}}, InvalidInput, "prompts: a prompt or a list .* is needed, got {'a'}"),
    ({"prompts": b"a"}, InvalidInput, "prompts: a prompt or a list .* is needed, got b'a'"),
    ({"seeds": "abc"}, InvalidInput, "seeds: an int or a list .* is needed, got 'abc'"),
    ({"seeds": 1.5}, InvalidInput, "seeds: an int or a list .* is needed, got 1.5"),
    ({"seeds": {1, 2}}, InvalidInput, "seeds: an int or a list .* is needed, got {1, 2}"),
    ({"seeds": torch.tensor(1.5)}, InvalidInput, "a seed is an int, got tensor"),
    ({"seeds": True}, InvalidInput, "a seed is an int, got True"),
    ({"num_inference_steps": 1001}, InvalidInput, "StableDiffusionPipeline: .* 1001 cannot be la"),
    ({"num_inference_steps": -1}, InvalidInput, "num_inference_steps=-1: a whole number of at lea"),
    ({"num_inference_steps": 1.5}, InvalidInput, "num_inference_steps=1.5: a whole number of at"),
    ({"num_inference_steps": "a"}, InvalidInput, "StableDiffusionPipeline: '>' not supported"),
    ({"height": 7}, InvalidInput, "StableDiffusionPipeline: `height` and `width` have to be div"),
    ({"height": -8}, InvalidInput, "height=-8: a whole number of at least 1 is needed"),
    ({"guidance_scale": float("nan")}, InvalidInput, "guidance_scale=nan: a finite number is ne"),
    ({"latents": "a"}, InvalidInput, "StableDiffusionPipeline: 'str' object has no attribute"),
    ({"latents": torch.zeros(1)}, InvalidInput, r"latents: values of each row are needed, got .1"),
    ({"edits": [SITE]}, InvalidInput, "edits: got str"),
    ({"record": 3.5}, InvalidInput, "record: got float 3.5"),
    ({"record": SITE, "memory_limit": 0}, InvalidInput, "need .* GiB are left; record fewer"),
    (
        {"record": SITE, "memory_limit": 1000},
        InvalidInput,
        "need .* GiB are left; record fewer steps",
    ),
    (
        {"edits": Scale("unet.time_embedding", 2.0, rows=0, tokens=3)},
        InvalidInput,
        "token 3 asked for, there are 1",
    ),
]


@pytest.mark.parametrize(
    ("given", "error", "text"), CASES, ids=[str(sorted(c[0])) + c[2][:20] for c in CASES]
)
def test_wrong_input_is_an_error(reader: Reader, given: Any, error: Any, text: str) -> None:
    arguments = {"prompts": "a red cat", "seeds": 0, **KW, **given}
    with pytest.raises(error, match=text):
        reader.run(**arguments)


def test_a_result_without_the_entry_that_is_wanted_is_named() -> None:
    for result, element in (((torch.ones(1),), 1), ((None,), 0), ((), None), (5, None)):
        with pytest.raises(InvalidInput, match=f"net: the module gives {type(result).__name__}, "):
            pick(result, element, "net")
    assert pick((None, torch.ones(1)), None, "net") == pick((torch.ones(1),), 0, "net") == 1


def test_hooks_are_pairs(reader: Reader) -> None:
    for hooks in (5, [5], [(SITE, 5)], [(SITE,)], {SITE: len}):
        with pytest.raises(InvalidInput, match="hooks: pairs .site, function. are needed"):
            reader.run_with_hooks("a cat", hooks, seeds=0, **KW)


def test_seeds_of_a_block_are_a_list(reader: Reader) -> None:
    for seeds in (5, {1}, "a"):
        with pytest.raises(InvalidInput, match="seeds: an int or a list"):
            with reader.editing(Steer(SITE, V), seeds=seeds):
                raise AssertionError


def test_what_a_function_of_the_caller_raises_stays_what_it_is(reader: Reader) -> None:
    def fail(x: Any) -> Any:
        raise ValueError("of the caller")

    with pytest.raises(ValueError, match="^of the caller$") as caught:
        reader.run("a cat", edits=Edit(SITE, fail), seeds=0, **KW)
    assert not isinstance(caught.value, DreamreaderError)


def test_the_pipeline_runs_as_before_after_an_error(reader: Reader) -> None:
    plain = reader.run("a cat", seeds=0, **KW).images
    with pytest.raises(InvalidInput):
        reader.run("a cat", edits=Steer(SITE, torch.ones(7)), seeds=0, **KW)
    assert torch.equal(reader.run("a cat", seeds=0, **KW).images, plain)


def test_an_error_in_the_block_is_not_hidden(reader: Reader) -> None:
    with pytest.raises(KeyError, match="mine"), reader.recording(SITE):
        raise KeyError("mine")
    with pytest.raises(NeverFired, match="no part of the subject was run"), reader.recording(SITE):
        pass


def test_an_exception_in_a_function_leaves_nothing_behind(reader: Reader) -> None:
    with pytest.raises(ZeroDivisionError):
        reader.run_with_hooks("a cat", [(SITE, lambda x: 1 / 0)], seeds=0, **KW)


def test_a_pipeline_without_a_prompt_is_refused() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    reader = Reader(DDPMPipeline(unet, DDPMScheduler()))
    with pytest.raises(
        InvalidInput, match="DDPMPipeline takes no prompt with a generator; use recording"
    ):
        reader.run("a cat")


@pytest.mark.parametrize("subject", ["shapes", None, torch.ones(3)])
def test_what_is_no_subject(subject: Any) -> None:
    with pytest.raises(InvalidInput, match="a Reader wraps a diffusers pipeline"):
        Reader(subject)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_overflow_is_reported(dtype: torch.dtype) -> None:
    reader = Reader(torch.nn.Sequential(torch.nn.Linear(4, 4)).to(dtype))
    x = torch.ones(1, 2, 4, dtype=dtype)
    with reader.editing(Steer("0", torch.full((4,), torch.finfo(dtype).max), -1e6)) as report:
        reader.subject(x)
    assert report[0].notes == ["overflow to infinity at steps 0"]
    with reader.editing(Steer("0", torch.ones(4), -1e3)) as report:
        reader.subject(x)
    assert not report[0].notes


def test_a_strength_that_changes_nothing_is_reported(reader: Reader) -> None:
    result = reader.run("a cat", edits=Steer(SITE, 1e-30 * V, 1.0), seeds=0, **KW)
    assert result.firing[0].notes == ["strength above 0, but no value changed"]
    none = reader.run("a cat", edits=Steer(SITE, V, 0.0), seeds=0, **KW).firing
    assert none[0].passed_over == 2 and not none[0].notes
    assert "2 calls at strength 0" in repr(none)


def test_integers_cannot_be_edited() -> None:
    reader = Reader(*tiny.language_model("gpt2"))
    with pytest.raises(InvalidInput, match="holds torch.int64, only floating point can be edited"):
        reader.run("a cat", edits=Scale("transformer.wte:in", 2.0))


def test_record_refuses_a_reduction_that_loses_rows(reader: Reader) -> None:
    record = Record(SITE, reduce=lambda x: x.mean())
    with pytest.raises(
        InvalidInput, match="reduce made .* rows and the number of dimensions must stay"
    ):
        reader.run("a cat", record=record, seeds=0, **KW)
