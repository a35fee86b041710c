"""Encoders of transformers, for text, pictures and sound, shrunk by the rule of the decoders."""

import dataclasses
from functools import cache
from typing import Any

import torch

from .decoders import LAYERS, SIZES, WORDS
from .weights import settle

_SIZES = {**SIZES, "image_size": 16, "patch_size": 4, "eos_token_id": 2}
_PICTURES = (
    "BeitModel", "CLIPVisionModel", "DPTModel", "Data2VecVisionModel", "DeiTModel", "Dinov2Model",
    "Dinov2WithRegistersModel", "FlavaImageModel", "IJepaModel", "InternVLVisionModel",
    "OwlViTVisionModel", "PixtralVisionModel", "SiglipVisionModel", "ViTMAEModel", "ViTMSNModel",
    "ViTModel",
)  # fmt: skip
_TEXTS = (
    "AlignTextModel", "AltCLIPTextModel", "CLIPTextModel", "ChineseCLIPTextModel", "GPT2Model",
    "ImageGPTModel", "SiglipTextModel", "T5EncoderModel", "UMT5EncoderModel",
)  # fmt: skip
_SOUNDS = ("HubertModel", "UniSpeechModel", "Wav2Vec2Model", "WavLMModel")

# what a class needs beside the rule
_FIELDS: dict[str, dict[str, Any]] = {
    "AlbertForMaskedLM": {"num_hidden_layers": 1},  # its layers are one
    "MobileBertForMaskedLM": {"embedding_size": 16},
    "XmodForMaskedLM": {"default_language": "en_XX"},
    "LongformerForMaskedLM": {"attention_window": [4] * LAYERS},
}
# why a class is not here
LEFT_OUT: dict[str, str] = {
    "EsmcForMaskedLM": "does without an attention that torch computes eagerly",
    "LukeForMaskedLM": "has a vocabulary of entities beside that of words",
    "ModernVBertForMaskedLM": "has a tower for pictures",
    "NeoMMEForMaskedLM": "has a tower for pictures",
    "PerceiverForMaskedLM": "reads bytes into a latent array of a fixed size",
    "ReformerForMaskedLM": "is in the table of the decoders",
    "UltraVBertForMaskedLM": "has a tower for pictures",
}


@cache
def names() -> list[str]:
    """Every class that `build` knows: all masked language models, and some of pictures, sound."""
    from transformers.models.auto import modeling_auto as auto

    masked = [
        each
        for each in dict.fromkeys(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
        if each.endswith("ForMaskedLM") and each not in LEFT_OUT
    ]
    return [*masked, *_PICTURES, *_TEXTS, *_SOUNDS]


def build(name: str) -> Any:
    """A new model of a class; its weights depend only on `name`."""
    import transformers

    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    known = {each.name for each in dataclasses.fields(config_class)}
    small = {field: value for field, value in _SIZES.items() if field in known}
    torch.manual_seed(0)
    return settle(model_class(config_class(**{**small, **_FIELDS.get(name, {})})), name)


def inputs(model: Any) -> dict[str, Any]:
    """Two rows of what the model reads."""
    rng = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=rng)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 4000, generator=rng)}
    return {"input_ids": torch.randint(3, WORDS, (2, 7), generator=rng)}
