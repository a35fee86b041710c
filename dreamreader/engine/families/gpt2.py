"""Attention modules of GPT-2: one Conv1D c_attn gives q, k and v side by side."""

from torch import nn

from dreamreader.engine.taps import AttentionFacts, Tap


def attention(module: nn.Module) -> AttentionFacts | None:
    """Facts of a GPT-2 self-attention module, None where `module` is none."""
    if not hasattr(module, "c_attn") or not hasattr(module, "c_proj"):
        return None
    if getattr(module, "is_cross_attention", False):
        return None
    heads = getattr(module, "num_heads", None)
    width = getattr(module, "embed_dim", None)
    if heads is None or width is None:
        return None
    fused = module.get_submodule("c_attn")
    ports = {
        letter: Tap(fused, channels=(number * width, (number + 1) * width), heads=heads)
        for number, letter in enumerate("qkv")
    }
    ports["heads"] = Tap(module.get_submodule("c_proj"), side="in", heads=heads)
    return AttentionFacts(ports, heads)
