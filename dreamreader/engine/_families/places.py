"""Where tokens are: number of text tokens, grid of the image tokens, and their order.

`layout(denoiser, arguments)` reads it from one call. A sequence at a site is then told apart by
its length.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dreamreader.engine._families.classes import entry_of

# What modules of denoisers are called that work on the text, on the keys of an attention, and on
# the image alone.
_TEXT = re.compile(
    r"(^|\.)(\w+_context|context_\w+|add_[qkv]_proj|norm_added_[qk]|to_add_out|norm_cross|txt_\w+"
    r"|caption_\w+|text_\w+|encoder_hid_proj)([.:]|$)|\.text$"
)
_KEYS = re.compile(r"\.(to|norm)_[kv]([.:]|$)|:[kv]$")
_CROSSING = re.compile(r"attn2|cross")
_IMAGE = re.compile(
    r"\.(to_q|to_out|norm_q|ff|norm\d*|img_\w+|x_embedder|noise_refiner|patch_embed|pos_embed"
    r"|proj_out)([.:]|$)|:(q|heads|probs)$|\.image$"
)


@dataclass(frozen=True)
class StreamLayout:
    """Token places of one denoiser call.

    Args:
        grid: (height, width) of the image tokens; of the latents for a UNet.
        text: number of text tokens.
        pyramid: image tokens also come in halved grids, as in a UNet.
        text_first: in a joint sequence the text tokens come before the image tokens.
        text_lengths: text tokens of each batch entry in a joint sequence, where they differ.
        text_offset: text tokens that the denoiser puts before those of the prompt.
    """

    grid: tuple[int, int] | None = None
    text: int | None = None
    pyramid: bool = False
    text_first: bool = True
    text_lengths: tuple[int, ...] | None = None
    text_offset: int = 0

    def grid_of(self, tokens: int) -> tuple[int, int] | None:
        """The grid that has this many cells: the full one or, in a UNet, a halved one."""
        if self.grid is None:
            return None
        height, width = self.grid
        while True:
            if height * width == tokens:
                return height, width
            if not self.pyramid or (height <= 1 and width <= 1):
                return None
            height, width = -(-height // 2), -(-width // 2)

    def kind_of(self, tokens: int) -> str:
        """`image`, `text`, `joint` or `unknown`: what a sequence of this length holds."""
        cells = self.grid[0] * self.grid[1] if self.grid else None
        if self.grid_of(tokens) is not None:
            return "image"
        if tokens == self.text:
            return "text"
        longest = max(self.text_lengths) if self.text_lengths else self.text
        if cells is not None and longest is not None and tokens == cells + longest:
            return "joint"
        return "unknown"

    def kind_at(self, name: str, tokens: int, crosses: Callable[[], bool | None]) -> str:
        """Like `kind_of`, for a site: where text and image are of one length its name tells them.

        Args:
            name: of the site.
            crosses: tells whether the attention there reads the text; None: no word of that.
        """
        kind, text = self.kind_of(tokens), self.text
        if kind != "image" or text is None or tokens not in (text, text - self.text_offset):
            return kind
        if _TEXT.search(name):
            return "text" if tokens == text else "unknown"
        if _KEYS.search(name):
            crossing = crosses()
            if crossing is None:
                return "unknown" if _CROSSING.search(name) else "image"
            return "text" if crossing else "image"
        return "image" if self.pyramid or _IMAGE.search(name) else "unknown"

    def start_of(self, stream: str, entry: int, tokens: int) -> tuple[int, int]:
        """(first, last + 1) of a stream in the joint sequence of one batch entry."""
        assert self.grid is not None and self.text is not None
        cells = self.grid[0] * self.grid[1]
        text = self.text_lengths[entry] if self.text_lengths else self.text
        if self.text_first:
            return (0, text) if stream == "text" else (text, text + cells)
        return (0, cells) if stream == "image" else (cells, cells + text)


def layout(denoiser: nn.Module, arguments: Mapping[str, Any]) -> StreamLayout:
    """Token places of a call of `denoiser` with these arguments (bound by name)."""
    build = entry_of(type(denoiser), _FAMILIES, "forward") or _by_patch
    return build(denoiser, arguments)


def leaves_padding_out(denoiser: nn.Module) -> bool:
    """Whether its joint sequences hold the text of each entry without padding."""
    return entry_of(type(denoiser), _FAMILIES, "forward") is _lumina


def text_lengths(arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Text tokens of each batch entry, by the mask of a call."""
    mask = arguments.get("encoder_attention_mask")
    return tuple(mask.sum(1).tolist()) if isinstance(mask, Tensor) else None


def _text(arguments: Mapping[str, Any]) -> int | None:
    states = arguments.get("encoder_hidden_states")
    return states.shape[1] if isinstance(states, Tensor) and states.dim() == 3 else None


def _sample(arguments: Mapping[str, Any]) -> Tensor | None:
    for name in ("sample", "hidden_states"):
        if isinstance(arguments.get(name), Tensor):
            return arguments[name]
    return None


def _unet(denoiser: nn.Module, arguments: Mapping[str, Any]) -> StreamLayout:
    sample = _sample(arguments)
    grid = (sample.shape[-2], sample.shape[-1]) if sample is not None else None
    return StreamLayout(grid, _text(arguments), pyramid=True)


def _count_patches(denoiser: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    sample = _sample(arguments)
    patch = getattr(getattr(denoiser, "config", None), "patch_size", None)
    if sample is None or sample.dim() != 4 or not isinstance(patch, int):
        return None
    return sample.shape[-2] // patch, sample.shape[-1] // patch


def _by_patch(denoiser: nn.Module, arguments: Mapping[str, Any]) -> StreamLayout:
    return StreamLayout(_count_patches(denoiser, arguments), _text(arguments))


def _sd3(denoiser: nn.Module, arguments: Mapping[str, Any]) -> StreamLayout:
    return StreamLayout(_count_patches(denoiser, arguments), _text(arguments), text_first=False)


def _flux(denoiser: nn.Module, arguments: Mapping[str, Any]) -> StreamLayout:
    ids = arguments.get("img_ids")
    grid = None
    if isinstance(ids, Tensor):
        last = ids.reshape(-1, ids.shape[-1])[:, 1:3].amax(0).tolist()
        grid = (int(last[0]) + 1, int(last[1]) + 1)
    return StreamLayout(grid, _text(arguments))


def _qwen_image(denoiser: nn.Module, arguments: Mapping[str, Any]) -> StreamLayout:
    shapes = arguments.get("img_shapes")
    while isinstance(shapes, list) and shapes and not isinstance(shapes[0], int):
        shapes = shapes[0]
    grid = (shapes[1], shapes[2]) if isinstance(shapes, tuple | list) and len(shapes) == 3 else None
    return StreamLayout(grid, _text(arguments))


def _lumina(denoiser: nn.Module, arguments: Mapping[str, Any]) -> StreamLayout:
    lengths = text_lengths(arguments)
    return StreamLayout(_count_patches(denoiser, arguments), _text(arguments), text_lengths=lengths)


def _aura_flow(denoiser: nn.Module, arguments: Mapping[str, Any]) -> StreamLayout:
    text, registers = _text(arguments), getattr(denoiser, "register_tokens", None)
    extra = registers.shape[1] if isinstance(registers, Tensor) else 0
    text = None if text is None else text + extra
    return StreamLayout(_count_patches(denoiser, arguments), text, text_offset=extra)


_FAMILIES: dict[str, Callable[[nn.Module, Mapping[str, Any]], StreamLayout]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen_image,
    "Lumina2Transformer2DModel": _lumina,
    "AuraFlowTransformer2DModel": _aura_flow,
}
