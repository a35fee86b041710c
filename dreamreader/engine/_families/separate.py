"""Attention modules with a projection each for q, k and v, and one for the output."""

from torch import nn

from dreamreader.engine._families import sizes
from dreamreader.engine._families.sizes import PortsRefused
from dreamreader.engine._taps import AttentionFacts, Channels, Tap

# Names of q, k and v, then those that the output projection goes by.
_NAMES = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense", "Wo", "projection_layer")),
    (("q", "k", "v"), ("o",)),
    (("query", "key", "value"), ("out_proj", "dense")),
    (("q_lin", "k_lin", "v_lin"), ("out_lin",)),
    (("Wq", "Wk", "Wv"), ("dense",)),
    (("query_proj", "key_proj", "value_proj"), ("out_proj",)),
    (("to_query", "to_key", "to_value"), ("out_layer",)),
)
# Norms of queries and keys, and what only adds to the scores.
_KNOWN = {
    "q_norm", "k_norm", "qk_norm", "q_layernorm", "k_layernorm", "query_layernorm",
    "key_layernorm", "q_layer_norm", "k_layer_norm", "relative_attention_bias",
    "distance_embedding", "query_norm", "key_norm",
}  # fmt: skip
# q_proj of these classes gives every head's query and, beside it, its output gate.
_GATE_BESIDE_QUERY = {
    "Qwen3NextAttention",
    "Qwen3_5Attention",
    "Qwen3_5MoeAttention",
    "Qwen4ExpTextAttention",
}
# Further parts of single classes, which leave q, k and v as they are.
_OWN_PARTS = {
    # an output gate: what the output projection reads is behind it
    "AfmoeAttention": "gate_proj",
    "HrmTextAttention": "gate_proj",
    "LagunaAttention": "g_proj",
    "Lfm3Attention": "g_proj",
    "MuseGlimmerTextAttention": "gate_proj",
    "Step3p7Attention": "g_proj",
    # a logit of each head that takes a share of its attention and has no value
    "GptOssAttention": "sinks",
    "MiMoV2FlashAttention": "sinks",
    "OpenAIPrivacyFilterAttention": "sinks",
    # the same as a factor, behind which the output projection reads
    "GraniteSWAAttention": "sinks",
    "GraniteMoeSWAAttention": "sinks",
    # a choice of keys; a norm of the result
    "Qwen4ExpTextAttention": "indexer",
    "AlbertAttention": "LayerNorm",
}
# A norm of the values, of tensors [batch, tokens, heads, d] or [batch, heads, tokens, d].
_TOKENS_FIRST = ("rows", "tokens", "heads", "features")
_HEADS_FIRST = ("rows", "heads", "tokens", "features")
_VALUE_NORMS = {
    "DiffusionGemmaDecoderTextAttention": _TOKENS_FIRST,
    "DiffusionGemmaEncoderTextAttention": _TOKENS_FIRST,
    "EmbeddingGemma2Attention": _HEADS_FIRST,
    "Gemma3nTextAttention": _TOKENS_FIRST,
    "Gemma4TextAttention": _TOKENS_FIRST,
    "Gemma4UnifiedTextAttention": _TOKENS_FIRST,
    "Gemma4VisionAttention": _TOKENS_FIRST,
}
# A norm over all heads, before which each head stands for itself.
_NORMS_OF_HEADS = {"BitNetAttention": "attn_sub_norm"}


def attention(module: nn.Module) -> AttentionFacts | None:
    """Facts of such an attention module, None where `module` is none.

    Raises:
        Refused: its projections do not have the sizes that it, or its configuration, states.
    """
    parts = module._modules
    for letters, outputs in _NAMES:
        if parts.get(letters[0]) is not None:
            output = next((each for each in outputs if parts.get(each) is not None), None)
            if output is not None or (letters[0] == "query" and parts.get("value") is not None):
                return _facts(module, letters, output)
    return None


def _facts(module: nn.Module, letters: tuple[str, ...], output: str | None) -> AttentionFacts:
    name = sizes.class_that_runs(type(module), "transformers")
    if type(module).__module__.endswith(".modeling_fsmt"):
        raise PortsRefused("its values are [tokens, batch, features]")
    known = {*letters, output or "", *_KNOWN, "v_norm"}
    known |= {_OWN_PARTS.get(name, ""), _NORMS_OF_HEADS.get(name, "")}
    sizes.check_parts(module, known)
    heads = sizes.head_count(module)
    key_heads = sizes.key_head_count(module, heads)
    gated = name in _GATE_BESIDE_QUERY
    query = module.get_submodule(letters[0])
    width = sizes.head_width(module, query, heads)
    sizes.check(letters[0], sizes.out_features(query), heads, width * (1 + gated))
    ports = {"q": Tap(query, heads=heads)}
    if gated:
        side = Channels((heads, 2, width), (slice(None), 0))
        ports["q"] = Tap(query, channels=side, heads=heads)
    refused: dict[str, str] = {}
    value_width = sizes.find_stated(module, ("v_head_dim",), configured=False) or width
    for letter, single, features in (("k", letters[1], width), ("v", letters[2], value_width)):
        try:
            ports[letter] = _key_or_value(module, letter, single, key_heads, features)
        except PortsRefused as reason:
            refused[letter] = str(reason)
    try:
        ports["heads"] = _heads(module, name, output, heads, value_width)
    except PortsRefused as reason:
        refused["heads"] = str(reason)
    return AttentionFacts(ports, heads, refused=refused)


def _key_or_value(module: nn.Module, letter: str, name: str, heads: int, width: int) -> Tap:
    """k as it is projected; v as it enters the attention: behind its norm, where it has one."""
    if getattr(module, "is_kv_shared_layer", False):
        raise PortsRefused(
            f"this layer has no {letter} of its own: it uses that of an earlier layer"
        )
    projection = sizes.part(module, name)
    norm = sizes.part(module, "v_norm") if letter == "v" else None
    if projection is not None:
        sizes.check(name, sizes.out_features(projection), heads, width, f"{letter} heads")
    if letter == "v":
        check_unchanged(module)
    if norm is not None:
        axes = _VALUE_NORMS.get(sizes.class_that_runs(type(module), "transformers"))
        if axes is None:
            raise PortsRefused("the order of tokens and heads at its v_norm is not known")
        return Tap(norm, heads=heads, axes=axes)
    if projection is None:
        raise PortsRefused(f"it has no {name}")
    return Tap(projection, heads=heads)


def check_unchanged(module: nn.Module) -> None:
    """What the projection gives must be what enters the attention.

    Raises:
        Refused: the configuration asks for values that are clipped, rotated or scaled on the way.
    """
    for holder in (module, vars(module).get("config")):
        clip = getattr(holder, "clip_qkv", None)
        if clip is not None:
            raise PortsRefused(f"values are clipped behind the projection (clip_qkv={clip})")
    if getattr(module, "rotary_value", False):
        raise PortsRefused("values are rotated behind the projection (rotary_value=True)")
    scale = getattr(module, "v_scale", 1.0)
    if scale != 1.0:
        raise PortsRefused(f"values are scaled behind the projection (v_scale={scale})")


def _heads(module: nn.Module, name: str, output: str | None, heads: int, width: int) -> Tap:
    """What the output projection reads; of a module without one, what it gives."""
    norm = _NORMS_OF_HEADS.get(name)
    if name == "MLCDAttention":
        raise PortsRefused("its output projection reads [tokens, batch, features]")
    if output is None:
        if not name:
            raise PortsRefused("it has no output projection, so what it gives is not known")
        return Tap(module, heads=heads)
    features = sizes.in_features(sizes.part(module, output))
    sizes.check(f"the input of {output}", features, heads, width)
    return Tap(module.get_submodule(norm or output), side="in", heads=heads)
