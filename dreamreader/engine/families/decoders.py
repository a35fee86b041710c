"""Attention modules of Llama, Qwen, Gemma, CLIP: q_proj, k_proj, v_proj, o_proj or out_proj."""

from torch import nn

from dreamreader.engine.taps import AttentionFacts, Tap


def attention(module: nn.Module) -> AttentionFacts | None:
    """Facts of such an attention module, None where `module` is none.

    q, k and v are what the projections give, before a norm of queries and keys (Qwen3, Gemma3) and
    before the rotation by position.
    """
    output = getattr(module, "o_proj", None) or getattr(module, "out_proj", None)
    if output is None or not all(hasattr(module, f"{letter}_proj") for letter in "qkv"):
        return None
    width = getattr(module, "head_dim", None)
    if not isinstance(width, int):
        return None
    ports = {}
    for letter in "qkv":
        projection = getattr(module, f"{letter}_proj")
        ports[letter] = Tap(projection, heads=projection.out_features // width)
    heads = ports["q"].heads
    ports["heads"] = Tap(output, side="in", heads=heads)
    return AttentionFacts(ports, heads or 1)
