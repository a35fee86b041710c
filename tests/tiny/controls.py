"""Families with a second network beside the denoiser: ControlNets and adapters."""

from collections.abc import Callable
from typing import Any

from .weights import settle


def _with(family: str, key: str, build: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    """The components of a family, and one more that is made from them."""

    def built() -> dict[str, Any]:
        from .parts import parts_of

        own = parts_of(family)
        return {**own, key: settle(build(own), f"{family}-{key}")}

    return built


def _controlnet(own: dict[str, Any]) -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(own["unet"], conditioning_embedding_out_channels=(8, 16))


def _union(own: dict[str, Any]) -> Any:
    from diffusers import ControlNetUnionModel

    config = {
        key: own["unet"].config[key]
        for key in (
            "in_channels down_block_types block_out_channels layers_per_block norm_num_groups "
            "cross_attention_dim transformer_layers_per_block attention_head_dim "
            "use_linear_projection addition_embed_type addition_time_embed_dim "
            "projection_class_embeddings_input_dim"
        ).split()
    }
    return ControlNetUnionModel(
        **config, conditioning_embedding_out_channels=(8, 16), num_control_type=2
    )


def _adapter(kind: str) -> Callable[[dict[str, Any]], Any]:
    def build(own: dict[str, Any]) -> Any:
        from diffusers import T2IAdapter

        return T2IAdapter(
            in_channels=3,
            channels=[16, 32],
            num_res_blocks=1,
            downscale_factor=4 if kind.endswith("xl") else 2,
            adapter_type=kind,
        )

    return build


def _sd3(extra: int) -> Callable[[dict[str, Any]], Any]:
    def build(own: dict[str, Any]) -> Any:
        from diffusers import SD3ControlNetModel

        return SD3ControlNetModel.from_transformer(
            own["transformer"],
            num_layers=1,
            num_extra_conditioning_channels=extra,
            load_weights_from_transformer=False,
        )

    return build


def _flux(own: dict[str, Any]) -> Any:
    from diffusers import FluxControlNetModel

    return FluxControlNetModel.from_transformer(
        own["transformer"],
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        load_weights_from_transformer=False,
    )


def _qwen(own: dict[str, Any]) -> Any:
    from diffusers import QwenImageControlNetModel

    return QwenImageControlNetModel.from_transformer(
        own["transformer"],
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        load_weights_from_transformer=False,
        extra_condition_channels=0,
    )


def _sana(own: dict[str, Any]) -> Any:
    from diffusers import SanaControlNetModel

    config = {**own["transformer"].config, "num_layers": 1}
    return SanaControlNetModel.from_config(config)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "sd-control": _with("sd", "controlnet", _controlnet),
    "sdxl-control": _with("sdxl", "controlnet", _controlnet),
    "sdxl-union": _with("sdxl-320", "controlnet", _union),
    "sd-adapter": _with("sd", "adapter", _adapter("full_adapter")),
    "sdxl-adapter": _with("sdxl", "adapter", _adapter("full_adapter_xl")),
    "sd3-control": _with("sd3", "controlnet", _sd3(0)),
    "sd3-control-mask": _with("sd3", "controlnet", _sd3(1)),
    "flux-control": _with("flux", "controlnet", _flux),
    "qwen-control": _with("qwen-image", "controlnet", _qwen),
    "sana-control": _with("sana", "controlnet", _sana),
}
