"""Attention modules of diffusers: to_q, to_out and so on, for text add_q_proj, to_add_out."""

from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from dreamreader.engine.families import sizes
from dreamreader.engine.families.sizes import Refused
from dreamreader.engine.taps import AttentionFacts, Channels, Tap

_NO_SOFTMAX = "Linear"  # in the processor's name: attention without a softmax (Sana)
_KNOWN = {
    "to_q", "to_k", "to_v", "to_out", "to_qkv", "to_kv", "to_added_qkv", "to_added_kv",
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_q", "norm_k", "norm_added_q",
    "norm_added_k", "norm_cross", "group_norm", "spatial_norm", "processor", "q_norm", "k_norm",
}  # fmt: skip
# The projection of an output gate: what the output projection reads is behind the gate.
_GATES = {
    "Krea2Attention": "to_gate",
    "LTX2Attention": "to_gate_logits",
    "SanaWMLTX2Attention": "to_gate_logits",
}


def attention(module: nn.Module) -> AttentionFacts | None:
    """Facts of a diffusers attention module, None where `module` is none.

    Raises:
        Refused: its projections do not have the sizes that it states, or its processor has
            projections of its own.
    """
    if hasattr(module, "to_qkv_mlp_proj"):
        return _parallel(module)
    if not hasattr(module, "to_q"):
        return None
    processor = getattr(module, "processor", None)
    name, theirs = type(processor).__name__, _is_of_diffusers(type(processor))
    if "CustomDiffusion" in name:
        raise Refused(f"its processor {name} has projections of its own")
    sizes.check_parts(module, _KNOWN | {_GATES.get(sizes.runs(module, "diffusers"), "")})
    heads = sizes.head_count(module)
    width = _width(module, heads)
    key_heads = _key_heads(module, heads, width)
    has_added = isinstance(getattr(module, "add_k_proj", None), nn.Module)
    two_streams = has_added and isinstance(getattr(module, "add_q_proj", None), nn.Module)
    joint = not two_streams and ("CogView" in name or "CogVideo" in name)
    ports, refused = _projections(module, processor, heads, key_heads, width)
    if "IPAdapter" in name or (has_added and not two_streams and "AddedKV" not in name):
        refused["heads"] = (
            f"{name} is not known to join its added keys with its own in one attention: its output "
            "projection reads the sum of two, which holds heads of neither"
        )
    elif not theirs:
        refused["heads"] = (
            f"its processor {name} is none of diffusers, so what enters the output projection is "
            "not known"
        )
    else:
        ports |= _output(module, heads, width)
    return AttentionFacts(
        ports,
        heads,
        no_probs="its attention is linear: there is no softmax" if _NO_SOFTMAX in name else None,
        refused=refused,
        joint=joint or getattr(module, "pre_only", False) is True or "Lumina" in name,
        streams={"image": 0, "text": 1} if two_streams or joint else {},
    )


def _is_of_diffusers(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "diffusers"


def _width(module: nn.Module, heads: int) -> int:
    """Features of one head."""
    found = sizes.stated(module, sizes.WIDTHS)
    inner = sizes.stated(module, ("inner_dim",))
    if found is None and inner is not None and inner % heads == 0:
        found = inner // heads
    return found or sizes.head_width(module, getattr(module, "to_q", None), heads)


def _key_heads(module: nn.Module, heads: int, width: int) -> int:
    """Grouped attention has fewer key heads; the older classes state their features only."""
    inner = sizes.stated(module, ("inner_kv_dim",), configured=False)
    if inner is not None and inner % width == 0:
        return inner // width
    return sizes.key_head_count(module, heads)


def _projections(
    module: nn.Module, processor: Any, heads: int, key_heads: int, width: int
) -> tuple[dict[str, Tap], dict[str, str]]:
    """q, k, v of the image stream (or the only one), and of the text stream if it has its own."""
    found: dict[str, Tap] = {}
    refused: dict[str, str] = {}
    fused = _runs_fused(module, processor)
    for letter, count in (("q", heads), ("k", key_heads), ("v", key_heads)):
        for key, single, joined in (
            (letter, f"to_{letter}", ("to_qkv", "to_kv")),
            (f"{letter}.text", f"add_{letter}_proj", ("to_added_qkv", "to_added_kv")),
        ):
            projection = getattr(module, single, None)
            tap = _fused(module, letter, joined, count, width, projection) if fused else None
            if tap is None and isinstance(projection, nn.Module):
                try:
                    sizes.check(single, sizes.out_features(projection), count, width)
                    tap = Tap(projection, heads=count)
                except Refused as reason:
                    refused[key] = str(reason)
            if tap is not None:
                found[key] = tap
    return found, refused


def _runs_fused(module: nn.Module, processor: Any) -> bool:
    """Whether the processor that runs reads the fused projections.

    The flag of the module tells nothing: older classes keep it after they are unfused, and the
    processors of some newer ones never ask for it.
    """
    name = type(processor).__name__
    if name.startswith("Fused"):
        return True
    return bool(getattr(module, "fused_projections", False)) and _asks_for_flag(type(processor))


@cache
def _asks_for_flag(kind: type) -> bool:
    """Whether the processor, or a function of its own file that it calls, reads the flag."""
    call = vars(kind).get("__call__")
    code = getattr(call, "__code__", None)
    if code is None:
        return False
    names = _names(code)
    for each in list(names):
        helper = getattr(call.__globals__.get(each), "__code__", None)
        if helper is not None:
            names |= _names(helper)
    return "fused_projections" in names


def _names(code: CodeType) -> set[str]:
    return set(code.co_names)


def _fused(
    module: nn.Module, letter: str, names: tuple[str, ...], heads: int, width: int, single: Any
) -> Tap | None:
    """The share of one letter in a projection of several, after `fuse_qkv_projections`."""
    for name in names:
        projection = getattr(module, name, None)
        letters = "kv" if name.endswith("kv") and not name.endswith("qkv") else "qkv"
        if not isinstance(projection, nn.Module) or letter not in letters:
            continue
        stem = "add_{}_proj" if "added" in name else "to_{}"
        parts = [sizes.out_features(getattr(module, stem.format(each), None)) for each in letters]
        if None in parts or sum(parts) != sizes.out_features(projection):  # pyright: ignore
            raise Refused(
                f"{name} has {sizes.out_features(projection)} features, where its parts "
                f"{', '.join(letters)} have {', '.join(map(str, parts))}"
            )
        start = sum(parts[: letters.index(letter)])  # pyright: ignore
        sizes.check(f"{letter} in {name}", sizes.out_features(single), heads, width)
        share = Channels((sum(parts),), (slice(start, start + heads * width),))  # pyright: ignore
        return Tap(projection, channels=share, heads=heads)
    return None


def _output(module: nn.Module, heads: int, width: int) -> dict[str, Tap]:
    """Heads: what enters the output projection; of a module without one, what leaves it."""
    found = {}
    projection = getattr(module, "to_out", None)
    if isinstance(projection, nn.ModuleList):
        projection = projection[0] if len(projection) else None
    if isinstance(projection, nn.Module):
        sizes.check("the input of to_out", sizes.in_features(projection), heads, width)
        found["heads"] = Tap(projection, side="in", heads=heads)
    else:
        found["heads"] = Tap(module, heads=heads)
    added = getattr(module, "to_add_out", None)
    if isinstance(added, nn.Module) and not getattr(module, "context_pre_only", False):
        sizes.check("the input of to_add_out", sizes.in_features(added), heads, width)
        found["heads.text"] = Tap(added, side="in", heads=heads)
    return found


def _parallel(module: nn.Module) -> AttentionFacts:
    """Flux 2: one projection for q, k, v and the perceptron, one for both outputs."""
    heads = sizes.head_count(module)
    width = _width(module, heads)
    into = module.get_submodule("to_qkv_mlp_proj")
    out = module.get_submodule("to_out")
    hidden, times = (
        sizes.stated(module, (name,)) or 0 for name in ("mlp_hidden_dim", "mlp_mult_factor")
    )
    inner, total = heads * width, 3 * heads * width + hidden * times
    if sizes.out_features(into) != total or sizes.in_features(out) != inner + hidden:
        raise Refused(
            f"its projections have {sizes.out_features(into)} and {sizes.in_features(out)} "
            f"features, where {total} and {inner + hidden} are stated"
        )
    ports = {
        letter: Tap(
            into,
            channels=Channels((total,), (slice(number * inner, (number + 1) * inner),)),
            heads=heads,
        )
        for number, letter in enumerate("qkv")
    }
    first = Channels((inner + hidden,), (slice(inner),))
    ports["heads"] = Tap(out, side="in", channels=first, heads=heads)
    return AttentionFacts(ports, heads, joint=True)
