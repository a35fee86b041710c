"""Multi-head latent attention (DeepSeek): keys and values are unfolded from one small vector."""

from torch import nn

from dreamreader.engine._families import sizes
from dreamreader.engine._families.sizes import PortsRefused
from dreamreader.engine._taps import AttentionFacts, Channels, Tap

_KNOWN = {
    "q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm",
    "kv_b_proj", "o_proj", "indexer",
}  # fmt: skip


def attention(module: nn.Module) -> AttentionFacts | None:
    """Facts of a latent attention, None where `module` is none.

    q: all features of every head, before the rotation of the last ones. k: the features that every
    head has for itself; the rotated ones are shared by all heads and belong to none. v: as they
    enter the attention.

    Raises:
        Refused: its projections do not have the sizes that it states.
    """
    unfold, output = sizes.part(module, "kv_b_proj"), sizes.part(module, "o_proj")
    if unfold is None or output is None:
        return None
    sizes.check_parts(module, _KNOWN)
    heads = sizes.head_count(module)
    shared, own, value = (
        _require_stated(module, name)
        for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    name = "q_b_proj" if sizes.part(module, "q_proj") is None else "q_proj"
    query = module.get_submodule(name)
    sizes.check(name, sizes.out_features(query), heads, own + shared)
    sizes.check("kv_b_proj", sizes.out_features(unfold), heads, own + value)
    sizes.check("the input of o_proj", sizes.in_features(output), heads, value)
    every = slice(None)
    shape = (heads, own + value)
    ports = {
        "q": Tap(query, heads=heads),
        "k": _tap_unfold(unfold, Channels(shape, (every, slice(own))), heads),
        "v": _tap_unfold(unfold, Channels(shape, (every, slice(own, None))), heads),
        "heads": Tap(output, side="in", heads=heads),
    }
    return AttentionFacts(ports, heads)


def _tap_unfold(unfold: nn.Module, channels: Channels, heads: int) -> Tap:
    # transformers hands the small vector on as one head: [batch, 1, tokens, features]
    axes = ("rows", "heads", "tokens", "features")
    return Tap(unfold, channels=channels, heads=heads, axes=axes)


def _require_stated(module: nn.Module, name: str) -> int:
    found = sizes.find_stated(module, (name,))
    if found is None:
        raise PortsRefused(f"neither it nor its configuration states {name}")
    return found
