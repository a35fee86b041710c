"""What of a spec reaches the subject's call: values, never code or objects."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
from transformers import GenerationConfig

from dreamreader.errors import DreamreaderError
from dreamreader.harvest import Spec
from dreamreader.specs.call import GenerateCall, check_call, check_generate
from dreamreader.specs.load import load_spec
from dreamreader.specs.parts import Common

_CODE = """
def generate(model, *args, **kwargs):
    open({mark!r}, "w").close()
"""


def refused(check: Any, *args: Any) -> str:
    with pytest.raises(DreamreaderError) as error:
        check(*args)
    return str(error.value)


def test_a_spec_runs_no_code_of_a_folder(tmp_path: Path) -> None:
    import tiny

    model, tokenizer = tiny.language_model("gpt2")
    folder, mark = tmp_path / "model", tmp_path / "ran"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(_CODE.format(mark=str(mark)))
    call = {"max_new_tokens": 1, "custom_generate": str(folder), "trust_remote_code": True}
    # the trap works where nobody refuses it
    model.generate(tokenizer("a", return_tensors="pt").input_ids, **call)
    assert mark.exists()
    mark.unlink()
    text = f"""
name: x
subject: {folder}
data: {{prompts: [a cat]}}
capture: [{{sites: transformer.h.1}}]
pipeline:
  max_new_tokens: 1
  custom_generate: {folder}
"""
    (tmp_path / "s.yaml").write_text(text)
    said = refused(load_spec, Spec, tmp_path / "s.yaml")
    assert said.startswith(f"{tmp_path}/s.yaml:8: pipeline.custom_generate: fetches or runs code")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trust_remote_code: true", "pipeline.trust_remote_code: fetches or runs code"),
        ("callback_on_step_end: os.system", "pipeline.callback_on_step_end: fetches or runs code"),
        ("guidance_scale: .nan", "pipeline.guidance_scale: must be finite, got nan"),
        ("sigmas: [1, {b: .inf}]", "pipeline.sigmas: must be finite"),
        ("when: 2001-01-01", "pipeline.when: takes numbers, texts, truth values and lists of them"),
    ],
)
def test_values_that_no_call_may_have(tmp_path: Path, line: str, said: str) -> None:
    head = "name: x\nsubject: shapes-unet\ndata: {prompts: [a]}\npipeline:\n  height: 32\n"
    (tmp_path / "s.yaml").write_text(f"{head}  {line}\n")
    assert refused(load_spec, Common, tmp_path / "s.yaml").startswith(
        f"{tmp_path}/s.yaml:6: {said}"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_inference_steps": "many"}, "pipeline.num_inference_steps: input should be a valid"),
        ({"num_inference_steps": 0}, "pipeline.num_inference_steps: input should be greater than"),
        ({"num_inference_steps": True}, "pipeline.num_inference_steps: input should be a valid"),
        ({"guidance_scale": "x"}, "pipeline.guidance_scale: input should be a valid number, got"),
        ({"latents": 1}, "pipeline.latents: takes objects, which a spec cannot write"),
        ({"generator": 1}, "pipeline.generator: takes objects, which a spec cannot write"),
        ({"sigmas": ["a"]}, "pipeline.sigmas: input should be a valid number, got ['a']"),
        (
            {"guidance": 2},
            "unknown argument of StableDiffusionPipeline 'guidance'; nearest: guidance_scale",
        ),
    ],
)
def test_arguments_of_a_pipeline(given: dict[str, Any], said: str) -> None:
    pipeline = object.__new__(diffusers.StableDiffusionPipeline)
    assert refused(check_call, pipeline, given).startswith(said)


def test_arguments_of_a_pipeline_that_are_right() -> None:
    pipeline = object.__new__(diffusers.StableDiffusionXLPipeline)
    given = {
        **{"num_inference_steps": 3, "guidance_scale": 3, "sigmas": [1, 0.5], "clip_skip": None},
        **{"original_size": [64, 64], "cross_attention_kwargs": {"scale": 0.5}},
        **{"negative_prompt": ["a", "b"], "output_type": "pt"},
    }
    assert check_call(pipeline, given) == given


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_new_tokens": "x"}, "pipeline.max_new_tokens: input should be a valid integer"),
        ({"max_new_tokens": 0}, "pipeline.max_new_tokens: input should be greater than or equal"),
        ({"temperature": 0.0}, "pipeline.temperature: input should be greater than 0, got 0.0"),
        ({"do_sample": 1}, "pipeline.do_sample: input should be a valid boolean, got 1"),
        ({"temperatur": 1}, "unknown argument of generate 'temperatur'; nearest: temperature"),
        ({"dola_layers": "high"}, "unknown argument of generate 'dola_layers'"),
        ({"assistant_model": "x"}, "unknown argument of generate 'assistant_model'"),
    ],
)
def test_arguments_of_generate(given: dict[str, Any], said: str) -> None:
    assert refused(check_generate, given).startswith(said)


def test_every_argument_of_generate_is_one_of_transformers() -> None:
    own = {"logits_to_keep", "add_special_tokens"}  # of forward, and of the reader
    assert set(GenerateCall.model_fields) - own <= set(GenerationConfig().to_dict())
