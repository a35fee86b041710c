"""Attention modules of diffusers: to_q, to_out and so on, for text add_q_proj, to_add_out."""

import inspect
from functools import cache
from typing import Any

from torch import nn

from dreamreader.engine._families import sizes
from dreamreader.engine._families.sizes import PortsRefused
from dreamreader.engine._taps import AttentionFacts, Channels, Tap

_NO_SOFTMAX = "Linear"  # in the processor's name: attention without a softmax (Sana)
_KNOWN = {
    "to_q", "to_k", "to_v", "to_out", "to_qkv", "to_kv", "to_added_qkv", "to_added_kv",
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_q", "norm_k", "norm_added_q",
    "norm_added_k", "norm_cross", "group_norm", "spatial_norm", "processor", "q_norm", "k_norm",
    "to_q_t", "to_k_t", "to_v_t", "to_out_t", "q_rms_norm", "k_rms_norm", "q_rms_norm_t",
    "k_rms_norm_t", "history_key_scale",
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
    if sizes.part(module, "to_qkv_mlp_proj") is not None:
        return _parallel(module)
    if sizes.part(module, "to_q") is None:
        return None
    processor = getattr(module, "processor", None)
    name = type(processor).__name__
    if "CustomDiffusion" in name:
        raise PortsRefused(f"its processor {name} has projections of its own")
    sizes.check_parts(
        module, _KNOWN | {_GATES.get(sizes.class_that_runs(type(module), "diffusers"), "")}
    )
    heads = sizes.head_count(module)
    width = _width(module, heads)
    key_heads = _key_heads(module, heads, width)
    has_added = _find_added(module, "k") is not None
    two_streams = has_added and _find_added(module, "q") is not None
    joint = not two_streams and ("CogView" in name or "CogVideo" in name)
    ports, refused = _projections(module, processor, heads, key_heads, width)
    if "IPAdapter" in name or (has_added and not two_streams and "AddedKV" not in name):
        refused["heads"] = (
            f"{name} is not known to join its added keys with its own in one attention: its output "
            "projection reads the sum of two, which holds heads of neither"
        )
    elif processor is not None and not _is_of_diffusers(type(processor)):
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


def _find_added(module: nn.Module, letter: str) -> nn.Module | None:
    """The projection of the text stream."""
    return sizes.part(module, f"add_{letter}_proj") or sizes.part(module, f"to_{letter}_t")


def _is_of_diffusers(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "diffusers"


def _width(module: nn.Module, heads: int) -> int:
    """Features of one head."""
    found = sizes.find_stated(module, sizes.WIDTHS)
    inner = sizes.find_stated(module, ("inner_dim",))
    if found is None and inner is not None and inner % heads == 0:
        found = inner // heads
    return found or sizes.head_width(module, sizes.part(module, "to_q"), heads)


def _key_heads(module: nn.Module, heads: int, width: int) -> int:
    """Grouped attention has fewer key heads; the older classes state their features only."""
    inner = sizes.find_stated(module, ("inner_kv_dim",), configured=False)
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
        for key, projection, joined in (
            (letter, sizes.part(module, f"to_{letter}"), ("to_qkv", "to_kv")),
            (f"{letter}.text", _find_added(module, letter), ("to_added_qkv", "to_added_kv")),
        ):
            if projection is None:
                continue
            try:
                sizes.check(f"{key} projection", sizes.out_features(projection), count, width)
                tap = _find_fused(module, letter, joined, count, width) if fused else None
            except PortsRefused as reason:
                refused[key] = str(reason)
            else:
                found[key] = tap or Tap(projection, heads=count)
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
    call = inspect.unwrap(kind.__call__)
    if not inspect.isfunction(call):
        return False
    helpers = (call.__globals__.get(each) for each in call.__code__.co_names)
    functions = [call, *(each for each in helpers if inspect.isfunction(each))]
    return any("fused_projections" in each.__code__.co_names for each in functions)


def _find_fused(
    module: nn.Module, letter: str, names: tuple[str, ...], heads: int, width: int
) -> Tap | None:
    """The share of one letter in a projection of several, after `fuse_qkv_projections`."""
    for name in names:
        projection = sizes.part(module, name)
        letters = "qkv" if name.endswith("qkv") else "kv"
        if projection is None or letter not in letters:
            continue
        stem = "add_{}_proj" if "added" in name else "to_{}"
        parts = [sizes.out_features(sizes.part(module, stem.format(each))) or 0 for each in letters]
        if sum(parts) != sizes.out_features(projection):
            raise PortsRefused(
                f"{name} has {sizes.out_features(projection)} features, where its parts "
                f"{', '.join(letters)} have {', '.join(map(str, parts))}"
            )
        start = sum(parts[: letters.index(letter)])
        share = Channels((sum(parts),), (slice(start, start + heads * width),))
        return Tap(projection, channels=share, heads=heads)
    return None


def _output(module: nn.Module, heads: int, width: int) -> dict[str, Tap]:
    """Heads: what enters the output projection; of a module without one, what leaves it."""
    found = {}
    projection = sizes.part(module, "to_out")
    if isinstance(projection, nn.ModuleList):
        projection = projection[0] if len(projection) else None
    if projection is not None:
        sizes.check("the input of to_out", sizes.in_features(projection), heads, width)
        found["heads"] = Tap(projection, side="in", heads=heads)
    else:
        found["heads"] = Tap(module, heads=heads)
    added = sizes.part(module, "to_add_out") or sizes.part(module, "to_out_t")
    if added is not None and not getattr(module, "context_pre_only", False):
        sizes.check(
            "the input of the output projection of the text", sizes.in_features(added), heads, width
        )
        found["heads.text"] = Tap(added, side="in", heads=heads)
    return found


def _parallel(module: nn.Module) -> AttentionFacts:
    """Flux 2: one projection for q, k, v and the perceptron, one for both outputs."""
    heads = sizes.head_count(module)
    width = _width(module, heads)
    into = module.get_submodule("to_qkv_mlp_proj")
    out = module.get_submodule("to_out")
    hidden, times = (
        sizes.find_stated(module, (name,)) or 0 for name in ("mlp_hidden_dim", "mlp_mult_factor")
    )
    inner, total = heads * width, 3 * heads * width + hidden * times
    if sizes.out_features(into) != total or sizes.in_features(out) != inner + hidden:
        raise PortsRefused(
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
