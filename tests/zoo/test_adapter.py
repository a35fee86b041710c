"""Adapters are merged into the weights of what they were made for, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny.embedded import untrained
from torch import Tensor

import dreamreader as dr
from dreamreader.errors import InvalidInput
from dreamreader.specs.parts import Subject
from dreamreader.specs.subject import open_subject

# PEFT asks models for what transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "language"
    model, tokenizer = tiny.language_model("llama")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapted(language, tmp_path_factory) -> tuple[Path, Tensor]:
    """A LoRA adapter, and logits of the model with it beside its weights."""
    from peft import LoraConfig, get_peft_model

    path = tmp_path_factory.mktemp("adapters") / "lora"
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(dr.load(language).subject, config)
    model.save_pretrained(path)
    with torch.no_grad():
        return path, model.eval()(IDS).logits


def _logits(reader: dr.Reader) -> Tensor:
    with torch.no_grad():
        return reader.subject(IDS).logits


def test_an_adapter_is_merged(language, adapted) -> None:
    path, expected = adapted
    reader = dr.load(language, adapter=path)
    assert reader.sites().names == dr.load(language).sites().names
    assert not torch.allclose(expected, _logits(dr.load(language)), atol=1e-3)
    torch.testing.assert_close(_logits(reader), expected, atol=1e-5, rtol=1e-5)
    of_spec = open_subject(Subject(model=str(language), adapter=str(path)))
    assert torch.equal(_logits(of_spec), _logits(reader))


def test_the_adapter_of_a_spec_is_meant_from_its_folder(tmp_path) -> None:
    from dreamreader.experiments import ExperimentSpec
    from dreamreader.specs.load import load_spec

    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "name: a\nsubject: {model: smollm2-135m, adapter: mine/lora}\n"
        "data: {prompts: [{prompt: a}]}\nmethod: {kind: lens}\nmetrics: [detector]\n"
    )
    assert load_spec(ExperimentSpec, spec).subject.adapter == str(tmp_path / "mine" / "lora")


def test_adapters_that_do_not_fit_are_refused(language, adapted, tmp_path) -> None:
    path, _ = adapted
    with pytest.raises(InvalidInput, match="adapter: /no/where does not exist"):
        dr.load(language, adapter="/no/where")
    with pytest.raises(InvalidInput, match="has no adapter_config.json, which PEFT writes"):
        dr.load(language, adapter=language)
    shutil.copytree(path, tmp_path / "deep")
    _rename(tmp_path / "deep", "layers.2", "layers.7")
    with pytest.raises(
        InvalidInput, match=r"does not fit this LlamaForCausalLM: .*layers\.[27].* alone"
    ):
        dr.load(language, adapter=tmp_path / "deep")
    shutil.copytree(path, tmp_path / "nan")
    _rename(tmp_path / "nan", "", "", float("nan"))
    with pytest.raises(InvalidInput, match="NaN"):
        dr.load(language, adapter=tmp_path / "nan")
    shutil.copytree(path, tmp_path / "ranks")
    config = tmp_path / "ranks" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 7}))
    with pytest.raises(InvalidInput, match="does not fit this LlamaForCausalLM: size mismatch for"):
        dr.load(language, adapter=tmp_path / "ranks")
    shutil.copytree(path, tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(InvalidInput, match="broken: no adapter of PEFT"):
        dr.load(language, adapter=tmp_path / "broken")
    content = json.loads((path / "adapter_config.json").read_text())
    shutil.copytree(path, tmp_path / "foreign")
    (tmp_path / "foreign" / "adapter_config.json").write_text(
        json.dumps({**content, "target_modules": ["to_q"]})
    )
    with pytest.raises(InvalidInput, match="does not fit this LlamaForCausalLM: .*to_q"):
        dr.load(language, adapter=tmp_path / "foreign")


def test_an_adapter_of_tokens_is_refused(language, tmp_path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(dr.load(language).subject, config).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="adds tokens and changes no weights"):
        dr.load(language, adapter=tmp_path)


def test_an_adapter_is_no_model(adapted) -> None:
    with pytest.raises(InvalidInput, match="open its base model, with adapter='lora'"):
        dr.load(adapted[0])


def test_lora_of_a_pipeline_is_merged(tmp_path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    untrained().save_pretrained(tmp_path / "model")
    pipe: Any = dr.load(tmp_path / "model").subject
    torch.manual_seed(1)
    pipe.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
    )
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    beside = dr.Reader(pipe).run("a", seeds=0, **settings).images
    merged = dr.load(tmp_path / "model", adapter=tmp_path / "lora")
    plain = dr.load(tmp_path / "model")
    assert merged.sites().names == plain.sites().names
    torch.testing.assert_close(merged.run("a", seeds=0, **settings).images, beside)
    assert not torch.allclose(plain.run("a", seeds=0, **settings).images, beside, atol=1e-3)
    with pytest.raises(InvalidInput, match="does not fit this StableDiffusionPipeline"):
        dr.load(tmp_path / "model", adapter=tmp_path / "model")
    for name, change in CHANGES.items():
        (tmp_path / name).mkdir()
        file = "pytorch_lora_weights.safetensors"
        save_file(change(load_file(tmp_path / "lora" / file)), tmp_path / name / file)
        with pytest.raises(InvalidInput, match=f"{name} does not fit .*have a place in"):
            dr.load(tmp_path / "model", adapter=tmp_path / name)


CHANGES = {
    "half": lambda all: {k: v for k, v in all.items() if not ("up_blocks" in k and _down(k))},
    "renamed": lambda all: {k.replace("up_blocks.1", "up_blocks.9"): v for k, v in all.items()},
    "more": lambda all: all | {f"unet.more.{k}": v.clone() for k, v in all.items()},
}


def _down(name: str) -> bool:
    return "lora.down" in name or "lora_A" in name


def _rename(folder: Path, old: str, new: str, value: float | None = None) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if value is not None:
        tensors = {name: torch.full_like(each, value) for name, each in tensors.items()}
    save_file(
        {name.replace(old, new) if old else name: each for name, each in tensors.items()}, file
    )
