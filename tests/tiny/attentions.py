"""Attention modules of diffusers by themselves, with every processor that runs on a CPU."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .weights import settle

HEADS = 4
WIDTH = 8
FEATURES = HEADS * WIDTH
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("query_dim", "dim", "hidden_size", "num_channels", "q_dim", "kv_dim"), 32),
    **dict.fromkeys(("context_dim", "embed_dim"), 32),
    **dict.fromkeys(("heads", "num_heads", "num_attention_heads"), HEADS),
    **dict.fromkeys(("dim_head", "head_dim", "attention_head_dim", "dim_heads"), WIDTH),
    **dict.fromkeys(("num_kv_heads", "num_key_value_heads"), 2),
    "kv_heads": HEADS,
    "eps": 1e-5,
}


@dataclass(frozen=True)
class Line:
    """One attention.

    Args:
        path: module of diffusers.models and class, with a dot between.
        inputs: `self`, `cross`, `joint` (two streams) or `map` (a feature map and text).
        processor: class, "" for the default; with `(...)` its arguments.
        fields: arguments of the class beside the usual sizes.
        fused: projections are fused.
        given: further arguments of the call.
        text: name of the argument of the text.
    """

    path: str
    inputs: str = "self"
    processor: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    fused: bool = False
    given: dict[str, Any] = field(default_factory=dict)
    text: str = "encoder_hidden_states"

    @property
    def name(self) -> str:
        parts = [self.path.split(".")[-1], self.processor.split(".")[-1], self.inputs]
        extra = [f"{key}={value}" for key, value in self.fields.items() if key != "bias"]
        return " ".join([*(each for each in parts if each), *extra, "fused" * self.fused]).strip()


_OLD = "attention_processor.Attention"
_ADDED = {"added_kv_proj_dim": 32, "added_proj_bias": True, "out_dim": 32}
_JOINT = {**_ADDED, "context_pre_only": False}
_MAP = {"added_kv_proj_dim": 32, "norm_num_groups": 4}
_NORM = {"qk_norm": "rms_norm"}


def _old(processor: str, *inputs: str, **fields: Any) -> list[Line]:
    return [Line(_OLD, each, processor, fields) for each in inputs or ("self", "cross")]


def _new(path: str, *inputs: str, **fields: Any) -> list[Line]:
    return [Line(f"transformers.{path}", each, "", fields) for each in inputs or ("self",)]


LINES: list[Line] = [
    *_old("AttnProcessor"), *_old("AttnProcessor2_0"),
    *_old("SlicedAttnProcessor(2)"),
    *_old("AttnAddedKVProcessor", "map", **_MAP), *_old("AttnAddedKVProcessor2_0", "map", **_MAP),
    *_old("SlicedAttnAddedKVProcessor(2)", "map", **_MAP),
    *_old("JointAttnProcessor2_0", "joint", **_JOINT), *_old("JointAttnProcessor2_0", "self"),
    *_old("JointAttnProcessor2_0", "joint", **_ADDED, context_pre_only=True),
    *_old("AuraFlowAttnProcessor2_0", "joint", **_JOINT),
    *_old("AuraFlowAttnProcessor2_0", "self"),
    *_old("CogVideoXAttnProcessor2_0", "joint"), *_old("AllegroAttnProcessor2_0"),
    *_old("MochiVaeAttnProcessor2_0", "self"), *_old("StableAudioAttnProcessor2_0"),
    *_old("HunyuanAttnProcessor2_0"), *_old("PAGIdentitySelfAttnProcessor2_0", "self"),
    *_old("PAGHunyuanAttnProcessor2_0", "self"), *_old("SanaLinearAttnProcessor2_0", "self"),
    *_old("IPAdapterAttnProcessor2_0(32, 32)", "cross"),
    *_old("CustomDiffusionAttnProcessor(hidden_size=32, cross_attention_dim=32)", "cross"),
    *_old("transformers.sana_transformer.SanaAttnProcessor2_0"),
    *_old("transformers.transformer_cogview4.CogView4AttnProcessor", "joint"),
    *_old("transformers.transformer_glm_image.GlmImageAttnProcessor", "joint"),
    *_old("transformers.transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0", "joint", **_JOINT),
    Line(_OLD, "joint",
         "transformers.transformer_hunyuan_video15.HunyuanVideo15AttnProcessor2_0",
         {**_JOINT, **_NORM},
         given={"attention_mask": torch.ones(2, 5, dtype=torch.bool)}),
    *_old("transformers.transformer_hunyuanimage.HunyuanImageAttnProcessor", "joint", **_JOINT),
    *_old("transformers.transformer_easyanimate.EasyAnimateAttnProcessor2_0", "joint", **_JOINT),
    *_old("transformers.transformer_lumina2.Lumina2AttnProcessor2_0", "cross", kv_heads=2),
    *_old("transformers.transformer_omnigen.OmniGenAttnProcessor2_0", "cross"),
    *_old("transformers.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0", "joint",
          **_JOINT),
    *_old("transformers.transformer_z_image.ZSingleStreamAttnProcessor", "self"),
    *_old("transformers.transformer_nucleusmoe_image.NucleusMoEAttnProcessor2_0", "self"),
    *_old("transformers.transformer_cosmos.CosmosAttnProcessor2_0", "cross", **_NORM),
    *_old("unets.unet_dreamlite.DreamLiteAttnProcessor2_0"),
    *(Line(_OLD, each, "FusedAttnProcessor2_0", {}, True) for each in ("self", "cross")),
    Line(_OLD, "joint", "FusedJointAttnProcessor2_0", _JOINT, True),
    Line(_OLD, "joint", "FusedAuraFlowAttnProcessor2_0", _JOINT, True),
    Line(_OLD, "joint", "FusedCogVideoXAttnProcessor2_0", {}, True),
    *(Line(_OLD, each, "FusedHunyuanAttnProcessor2_0", {}, True) for each in ("self", "cross")),
    *_new("ace_step_transformer.AceStepAttention"),
    *_new("minimax_music3_rvq_depth_decoder.MiniMaxMusic3DepthAttention"),
    *_new("transformer_anyflow.AnyFlowAttention", "self", "cross"),
    *_new("transformer_bria.BriaAttention", "joint", **_JOINT),
    *_new("transformer_bria.BriaAttention", "self", pre_only=True),
    *_new("transformer_bria_fibo.BriaFiboAttention", "joint", **_JOINT),
    *_new("transformer_bria_fibo2.BriaFibo2Attention"),
    *_new("transformer_ernie_image.ErnieImageAttention"),
    *_new("transformer_flux.FluxAttention", "joint", **_JOINT),
    *_new("transformer_flux.FluxAttention", "self", pre_only=True),
    Line("transformers.transformer_flux.FluxAttention", "joint", "", _JOINT, True),
    *_new("transformer_flux2.Flux2Attention", "joint", **_ADDED),
    *_new("transformer_flux2.Flux2ParallelSelfAttention"),
    *_new("transformer_flux3.Flux3Attention"),
    *_new("transformer_kandinsky.Kandinsky5Attention"),
    *_new("transformer_kandinsky6.Kandinsky6Attention"),
    *_new("transformer_krea2.Krea2Attention"),
    *_new("transformer_longcat_audio_dit.AudioDiTAttention"),
    *_new("transformer_longcat_image.LongCatImageAttention", "joint", **_JOINT),
    *_new("transformer_ltx.LTXAttention", "self", "cross"),
    Line("transformers.transformer_ltx.LTXAttention", fused=True),
    *_new("transformer_ltx2.LTX2Attention", "self", "cross"),
    *_new("transformer_ltx2.LTX2Attention", "self", apply_gated_attention=True),
    *_new("transformer_minimax_h3.MiniMaxH3Attention"),
    *_new("transformer_motif_video.MotifVideoAttention", "joint", **_JOINT),
    *_new("transformer_motif_video.MotifVideoCrossAttention", "cross"),
    *_new("transformer_ovis_image.OvisImageAttention", "joint", **_JOINT),
    *_new("transformer_qwenimage21.QwenImage21Attention"),
    *_new("transformer_sana_wm_refiner.SanaWMLTX2Attention", "self", "cross"),
    *(
        Line(f"transformers.{path}Attention", each, f"transformers.{path}AttnProcessor", fields)
        for path in ("transformer_wan.Wan", "transformer_skyreels_v2.SkyReelsV2")
        for each, fields in (
            ("self", {}),
            ("cross", {"cross_attention_dim_head": WIDTH}),
            ("cross", {"added_kv_proj_dim": 32, "cross_attention_dim_head": WIDTH}),
        )
    ),
    Line("transformers.transformer_wan.WanAttention", "self",
         "transformers.transformer_wan.WanAttnProcessor", {}, True),
    Line("attention_processor.MochiAttention", "joint", "MochiAttnProcessor2_0", _ADDED,
         given={"attention_mask": torch.ones(2, 5, dtype=torch.bool)}),
    Line("transformers.transformer_hidream_image.HiDreamAttention", "joint",
         "transformers.transformer_hidream_image.HiDreamAttnProcessor",
         given={"image_rotary_emb": torch.eye(2).expand(1, 11, 1, 4, 2, 2)},
         text="norm_encoder_hidden_states"),
    *_new("transformer_joyimage.JoyImageAttention", "joint"),
    *_new("transformer_prx.PRXAttention", "joint"),
    Line("autoencoders.autoencoder_kl_kvae_audio.KVAEAudioAttention"),
    Line("autoencoders.autoencoder_kl_minimax_h3.MiniMaxH3VideoAttention"),
]  # fmt: skip


class Alone(nn.Module):
    """A model that is one attention."""

    def __init__(self, attn: nn.Module):
        super().__init__()
        self.attn = attn

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> Any:
        return self.attn(hidden_states, **given)


def build(line: Line) -> tuple[nn.Module, Callable[[], Any]]:
    """The attention as a model, and a call of it with two rows."""
    kind = _named(line.path)
    known = inspect.signature(kind.__init__).parameters
    usual = {
        key: value
        for key, value in _SIZES.items()
        if key in known and (known[key].default is inspect.Parameter.empty or key in _STATED)
    }
    fields = {**usual, **line.fields}
    if line.inputs == "cross" and "cross_attention_dim" in known:
        fields["cross_attention_dim"] = 32
    if line.processor:
        fields["processor"] = _processor(line.processor)
    attn = kind(**fields)
    if line.fused:
        attn.fuse_projections()
    model = settle(Alone(attn), line.name)
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(2, 6, FEATURES, generator=rng)
    given = dict(line.given)
    if line.inputs == "map":
        image = image.transpose(1, 2).unflatten(2, (2, 3))
    if line.inputs != "self":
        length = 516 if "Wan" in line.path or "SkyReels" in line.path else 5
        given[line.text] = torch.randn(2, length, FEATURES, generator=rng)

    def call() -> Any:
        return model(image, **given)

    return model, call


_STATED = ("heads", "num_heads", "dim_head", "head_dim", "kv_heads")


def _named(path: str) -> Any:
    place, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"diffusers.models.{place}"), name)


def _processor(text: str) -> Any:
    name, _, arguments = text.partition("(")
    kind = _named(name if "." in name else f"attention_processor.{name}")
    given = [each.strip() for each in arguments.rstrip(")").split(",") if each]
    named = dict(each.split("=") for each in given if "=" in each)
    return kind(
        *(int(each) for each in given if "=" not in each),
        **{key: int(value) for key, value in named.items()},
    )
