"""Attention modules of diffusers: to_q, to_out and so on, for text add_q_proj, to_add_out."""

from torch import nn

from dreamreader.engine.taps import AttentionFacts, Tap

_NO_SOFTMAX = "Linear"  # in the processor's name: attention without a softmax (Sana)


def attention(module: nn.Module) -> AttentionFacts | None:
    """Facts of a diffusers attention module, None where `module` is none."""
    if not hasattr(module, "to_q") and not hasattr(module, "to_qkv"):
        return None
    heads = getattr(module, "heads", None)
    if not isinstance(heads, int):
        return None
    ports = _projections(module, heads) | _output(module, heads)
    name = type(getattr(module, "processor", None)).__name__
    two_streams = getattr(module, "add_k_proj", None) is not None
    joint = not two_streams and ("CogView" in name or "CogVideo" in name)
    inside = two_streams or joint
    return AttentionFacts(
        ports,
        heads,
        no_probs="its attention is linear: there is no softmax" if _NO_SOFTMAX in name else None,
        joint=joint or getattr(module, "pre_only", False) is True or "Lumina" in name,
        streams={"image": 0, "text": 1} if inside else {},
    )


def _projections(module: nn.Module, heads: int) -> dict[str, Tap]:
    """q, k, v of the image stream (or the only one), and of the text stream if it has its own."""
    found: dict[str, Tap] = {}
    kv_heads = _kv_heads(module, heads)
    for letter, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        for key, single, fused in (
            (letter, f"to_{letter}", ("to_qkv", "to_kv")),
            (f"{letter}.text", f"add_{letter}_proj", ("to_added_qkv",)),
        ):
            tap = _fused(module, letter, fused, count) if _is_fused(module) else None
            projection = getattr(module, single, None)
            if tap is None and isinstance(projection, nn.Module):
                tap = Tap(projection, heads=count)
            if tap is not None:
                found[key] = tap
    return found


def _is_fused(module: nn.Module) -> bool:
    return bool(getattr(module, "fused_projections", False))


def _fused(module: nn.Module, letter: str, names: tuple[str, ...], heads: int) -> Tap | None:
    """The share of one letter in a projection of several, after `fuse_qkv_projections`."""
    for name in names:
        projection = getattr(module, name, None)
        if not isinstance(projection, nn.Module) or letter not in name.removeprefix("to_added_"):
            continue
        letters = "kv" if name == "to_kv" else "qkv"
        width = int(getattr(projection, "out_features", 0)) // len(letters)
        start = letters.index(letter) * width
        return Tap(projection, channels=(start, start + width), heads=heads)
    return None


def _kv_heads(module: nn.Module, heads: int) -> int:
    """Grouped attention has fewer key heads: the widths of the projections tell."""
    inner, inner_kv = getattr(module, "inner_dim", None), getattr(module, "inner_kv_dim", None)
    if inner and inner_kv and inner_kv != inner:
        return heads * inner_kv // inner
    return heads


def _output(module: nn.Module, heads: int) -> dict[str, Tap]:
    """Heads: what enters the output projection; of a module without one, what leaves it."""
    found = {}
    projection = getattr(module, "to_out", None)
    if isinstance(projection, nn.ModuleList) and len(projection):
        found["heads"] = Tap(projection[0], side="in", heads=heads)
    elif isinstance(projection, nn.Module) and not isinstance(projection, nn.ModuleList):
        found["heads"] = Tap(projection, side="in", heads=heads)
    else:
        found["heads"] = Tap(module, heads=heads)
    added = getattr(module, "to_add_out", None)
    if isinstance(added, nn.Module) and not getattr(module, "context_pre_only", False):
        found["heads.text"] = Tap(added, side="in", heads=heads)
    return found
