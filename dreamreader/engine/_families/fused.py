"""Attention modules whose one projection gives q, k and v; how they lie there decides the class."""

from collections.abc import Callable

from torch import nn

from dreamreader.engine._families import sizes
from dreamreader.engine._families.separate import check_unchanged
from dreamreader.engine._families.sizes import PortsRefused
from dreamreader.engine._taps import AttentionFacts, Channels, Tap

Layout = Callable[[nn.Module, int, int, int], dict[str, Channels]]

_EVERY = slice(None)
_KNOWN = {"q_norm", "k_norm", "q_layernorm", "k_layernorm", "dense_bias", "indexer"}


def _blocks(module: nn.Module, heads: int, key_heads: int, width: int) -> dict[str, Channels]:
    """All queries, then all keys, then all values."""
    first, second = heads * width, (heads + key_heads) * width
    total = second + key_heads * width
    edges = {"q": (0, first), "k": (first, second), "v": (second, total)}
    return {letter: Channels((total,), (slice(*edge),)) for letter, edge in edges.items()}


def _by_head(module: nn.Module, heads: int, key_heads: int, width: int) -> dict[str, Channels]:
    """Of every head in turn its query, key and value."""
    shape = (heads, 3, width)
    return {letter: Channels(shape, (_EVERY, number)) for number, letter in enumerate("qkv")}


def _by_group(module: nn.Module, heads: int, key_heads: int, width: int) -> dict[str, Channels]:
    """Of every key head in turn the queries that share it, then its key and value."""
    shape = (key_heads, heads // key_heads + 2, width)
    parts: dict[str, int | slice] = {"q": slice(-2), "k": -2, "v": -1}
    return {letter: Channels(shape, (_EVERY, part)) for letter, part in parts.items()}


def _four_shares(module: nn.Module, heads: int, key_heads: int, width: int) -> dict[str, Channels]:
    """Four shares (of the machine it was trained on), each with its queries, values and keys."""
    if heads % 4:
        raise PortsRefused(f"its projection lies in four shares, which {heads} heads do not fill")
    shape = (4, 3, heads // 4 * width)
    return {letter: Channels(shape, (_EVERY, "qvk".index(letter))) for letter in "qkv"}


def _falcon(module: nn.Module, heads: int, key_heads: int, width: int) -> dict[str, Channels]:
    if getattr(module, "new_decoder_architecture", False) or getattr(module, "multi_query", False):
        return _by_group(module, heads, key_heads, width)
    return _by_head(module, heads, heads, width)


def _bigcode(module: nn.Module, heads: int, key_heads: int, width: int) -> dict[str, Channels]:
    layout = _blocks if getattr(module, "multi_query", False) else _by_head
    return layout(module, heads, key_heads, width)


# Class in transformers: its projection, its output projection, how the projection lies.
_CLASSES: dict[str, tuple[str, str, Layout]] = {
    "GPT2Attention": ("c_attn", "c_proj", _blocks),
    "DecisionTransformerGPT2Attention": ("c_attn", "c_proj", _blocks),
    "ImageGPTAttention": ("c_attn", "c_proj", _blocks),
    "transformers.models.openai.modeling_openai.Attention": ("c_attn", "c_proj", _blocks),
    "GPTBigCodeAttention": ("c_attn", "c_proj", _bigcode),
    "GPTNeoXAttention": ("query_key_value", "dense", _by_head),
    "GPTNeoXJapaneseAttention": ("query_key_value", "dense", _by_head),
    "BloomAttention": ("query_key_value", "dense", _by_head),
    "PersimmonAttention": ("query_key_value", "dense", _by_head),
    "FalconAttention": ("query_key_value", "dense", _falcon),
    "MptAttention": ("Wqkv", "out_proj", _blocks),
    "DbrxAttention": ("Wqkv", "out_proj", _blocks),
    "ModernBertAttention": ("Wqkv", "Wo", _blocks),
    "Phi3Attention": ("qkv_proj", "o_proj", _blocks),
    "Phi4MultimodalAttention": ("qkv_proj", "o_proj", _blocks),
    "CodeGenAttention": ("qkv_proj", "out_proj", _four_shares),
    "BarkSelfAttention": ("att_proj", "out_proj", _blocks),
}


def attention(module: nn.Module) -> AttentionFacts | None:
    """Facts of an attention module of one of these classes, None for any other.

    Raises:
        Refused: its projections do not have the sizes that it, or its configuration, states.
    """
    name = sizes.class_that_runs(type(module), "transformers")
    entry = _CLASSES.get(name) or _CLASSES.get(f"{type(module).__module__}.{name}")
    if entry is None:
        return None
    name, output_name, layout = entry
    if getattr(module, "is_cross_attention", False):
        raise PortsRefused("it is a cross-attention, whose queries have a projection of their own")
    sizes.check_parts(module, {name, output_name, *_KNOWN})
    fused, output = module.get_submodule(name), module.get_submodule(output_name)
    heads = sizes.head_count(module)
    key_heads = sizes.key_head_count(module, heads)
    width = _width(module, output, heads)
    lies = layout(module, heads, key_heads, width)
    features = sizes.out_features(fused)
    if features != lies["q"].total:
        raise PortsRefused(
            f"{name} has {features} features, where {heads} heads and {key_heads} key heads of "
            f"{width} are stated, which is {lies['q'].total}"
        )
    counts = {"q": heads, "k": key_heads, "v": key_heads}
    refused: dict[str, str] = {}
    ports = {each: Tap(fused, channels=lies[each], heads=counts[each]) for each in "qkv"}
    try:
        check_unchanged(module)
    except PortsRefused as reason:
        refused["v"] = str(reason)
        del ports["v"]
    ports["heads"] = Tap(output, side="in", heads=heads)
    return AttentionFacts(ports, heads, refused=refused)


def _width(module: nn.Module, output: nn.Module, heads: int) -> int:
    """Features of one head: the output projection reads as many for each."""
    read = sizes.in_features(output)
    width = sizes.find_stated(module, sizes.WIDTHS)
    if width is None and read is not None and read % heads == 0:
        width = read // heads
    sizes.check("the input of its output projection", read, heads, width or 0)
    return width or 0
