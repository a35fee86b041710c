"""Attention modules of GPT-NeoX: query_key_value gives q, k and v of each head in turn."""

from torch import nn

from dreamreader.engine.taps import AttentionFacts, Tap


def attention(module: nn.Module) -> AttentionFacts | None:
    """Facts of a GPT-NeoX attention module, None where `module` is none."""
    width = getattr(module, "head_size", None)
    if width is None or not hasattr(module, "query_key_value") or not hasattr(module, "dense"):
        return None
    fused = module.get_submodule("query_key_value")
    heads = int(fused.out_features) // (3 * width)  # pyright: ignore[reportArgumentType]
    ports = {
        letter: Tap(fused, interleaved=(number, 3), heads=heads)
        for number, letter in enumerate("qkv")
    }
    ports["heads"] = Tap(module.get_submodule("dense"), side="in", heads=heads)
    return AttentionFacts(ports, heads)
