"""The tiny models are real ones: no tokenizer loses words, no part of a model is dead."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.oracle.cases import Case


class Recorder:
    """Keeps the arguments of a denoiser's first call."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.denoiser = denoiser
        self.arguments: dict[str, Any] = {}
        handle = denoiser.register_forward_pre_hook(self._keep, with_kwargs=True)
        self._handle = handle

    def _keep(self, module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._handle.remove()
        self.arguments = {**dict(zip(("sample", "timestep"), given, strict=False)), **named}
        if "transformer" in type(module).__name__.lower() and given:
            self.arguments["hidden_states"] = self.arguments.pop("sample")

    @torch.no_grad()
    def __call__(self, **changed: Any) -> Tensor:
        return self.denoiser(**{**self.arguments, **changed})[0]


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_denoiser_depends_on_prompt_time_and_place(name: str) -> None:
    case = Case(name, name)
    pipe = case.pipe()
    recorder = Recorder(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
    pipe(**case.pipeline_arguments())
    plain = recorder()

    def differs(other: Tensor) -> bool:
        return bool((other - plain).abs().max() > 1e-2 * plain.std())

    text = recorder.arguments["encoder_hidden_states"]
    assert differs(recorder(encoder_hidden_states=text.flip(0)))
    time = torch.as_tensor(recorder.arguments["timestep"])
    later = time * 0.5 + (time == 0) * 0.5  # Lumina2 counts from 0 to 1
    assert differs(recorder(timestep=later.to(time.dtype)))
    key = "sample" if "sample" in recorder.arguments else "hidden_states"
    latents = recorder.arguments[key]
    axis, shift = (1, 3) if latents.ndim == 3 else (3, 4)  # tokens, or columns in whole patches
    assert differs(recorder(**{key: latents.roll(shift, axis)}).roll(-shift, axis))


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_weights_depend_on_the_name_only(name: str) -> None:
    torch.manual_seed(0)
    one = tiny.pipeline(name)
    torch.manual_seed(1)
    two = tiny.pipeline(name)
    for key, part in one.components.items():
        if isinstance(part, torch.nn.Module):
            other = dict(getattr(two, key).named_parameters())
            assert all(torch.equal(other[path], weight) for path, weight in part.named_parameters())


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_tokenizers_keep_every_letter(name: str) -> None:
    pipe = tiny.pipeline(name)
    tokenizers = [part for key, part in pipe.components.items() if key.startswith("tokenizer")]
    assert tokenizers
    for tokenizer in tokenizers:
        ids = tokenizer("two red birds").input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "two red birds"
        assert tokenizer.unk_token_id not in tokenizer("xylophone").input_ids[1:-1]


def test_template_of_qwen_image_is_as_long_as_the_real_one() -> None:
    pipe = tiny.pipeline("qwen-image")
    template = pipe.prompt_template_encode.split("{}")[0]
    assert len(pipe.tokenizer(template).input_ids) == pipe.prompt_template_encode_start_idx


@pytest.mark.parametrize("name", tiny.LANGUAGE_MODELS)
@torch.no_grad()
def test_language_model_depends_on_words_and_places(name: str) -> None:
    model, tokenizer = tiny.language_model(name)
    ids = tokenizer(["the red cat and the dog", "the dog and the red cat"], return_tensors="pt")
    one, two = model(**ids).logits[:, -1]
    assert (one - two).abs().max() > 0.1
    swapped = ids.input_ids[:1].clone()
    swapped[0, -3:-1] = swapped[0, -3:-1].flip(0)  # same words, same last word, other order
    assert (model(input_ids=swapped).logits[0, -1] - one).abs().max() > 1e-3
