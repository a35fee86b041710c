"""Attention modules of T5 encoders: q, k, v, o."""

from torch import nn

from dreamreader.engine.taps import AttentionFacts, Tap


def attention(module: nn.Module) -> AttentionFacts | None:
    """Facts of a T5 attention module, None where `module` is none."""
    heads = getattr(module, "n_heads", None)
    if heads is None or not all(hasattr(module, letter) for letter in "qkvo"):
        return None
    ports = {letter: Tap(getattr(module, letter), heads=heads) for letter in "qkv"}
    ports["heads"] = Tap(module.get_submodule("o"), side="in", heads=heads)
    return AttentionFacts(ports, heads)
