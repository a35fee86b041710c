"""Attentions of diffusers by themselves, each with its processors: ports against their meaning."""

from collections import Counter
from typing import Any

import pytest
import torch
from tiny import attentions
from tiny.attentions import WIDTH, Line
from torch import Tensor, nn

from .attention_ports import ByHand, Gate, edits_differ, outcomes

GATES = {
    "Krea2Attention": Gate("to_gate", lambda out, *_: torch.sigmoid(out.unflatten(-1, (4, -1)))),
    "LTX2Attention": Gate("to_gate_logits", lambda out, *_: 2 * torch.sigmoid(out).unsqueeze(-1)),
}
# What is refused, and why.
REFUSED = {
    "SanaLinearAttnProcessor2_0": "its attention is linear",
    "IPAdapterAttnProcessor2_0": "the sum of two",
    "CustomDiffusionAttnProcessor": "has projections of its own",
    "MochiAttnProcessor2_0": "2 attentions ran inside the module",
    "PAGIdentitySelfAttnProcessor2_0": "ran more than once",
    "PAGHunyuanAttnProcessor2_0": "ran more than once",
    "cross added_kv_proj_dim": "the sum of two",  # of Wan and SkyReels
    "JoyImageAttention": "",
    "PRXAttention": "",
}
_seen: Counter = Counter()


def by_hand(module: nn.Module, line: Line) -> dict[str, ByHand]:
    """Head 0 at every port, from the names of the projections alone."""
    first = (slice(WIDTH),)
    if hasattr(module, "to_qkv_mlp_proj"):
        places = zip("qkv", (0, 32, 64), strict=True)
        ports = {
            letter: ByHand(module.to_qkv_mlp_proj, (slice(start, start + WIDTH),))
            for letter, start in places
        }
        return {**ports, "heads": ByHand(module.to_out, first, "in")}
    ports = {}
    for letter, long in zip("qkv", ("to_query", "to_key", "to_value"), strict=True):
        for port, names, joined in (
            (letter, (f"to_{letter}", long), "to_qkv to_kv"),
            (f"{letter}.text", (f"add_{letter}_proj", f"to_{letter}_t"), "to_added_qkv"),
        ):
            single = _first(module, *names)
            if single is not None:
                fused = _in_fused(module, letter, joined.split()) if line.fused else None
                ports[port] = fused or ByHand(single, first)
    out = _first(module, "to_out", "out_layer")
    out = out[0] if isinstance(out, nn.ModuleList) else out
    ports["heads"] = ByHand(module, first) if out is None else ByHand(out, first, "in")
    added = _first(module, "to_add_out", "to_out_t")
    if added is not None and not line.fields.get("context_pre_only"):
        ports["heads.text"] = ByHand(added, first, "in")
    return ports


def _first(module: nn.Module, *names: str) -> Any:
    found = (getattr(module, each, None) for each in names)
    return next((each for each in found if isinstance(each, nn.Module)), None)


def _in_fused(module: nn.Module, letter: str, names: list[str]) -> ByHand | None:
    if "LTX" in type(module).__name__:
        return None  # its processor never reads the fused projection
    name = next((each for each in names if hasattr(module, each) and letter in each[3:]), None)
    if name is None:
        return None
    projection, letters = getattr(module, name), name.rpartition("_")[2]
    start = letters.index(letter) * projection.out_features // len(letters)
    return ByHand(projection, (slice(start, start + WIDTH),))


@pytest.mark.parametrize("line", attentions.LINES, ids=lambda line: line.name)
def test_ports_have_their_meaning(line: Line) -> None:
    model, call = attentions.build(line)

    def flat() -> Tensor:
        out = call()
        return torch.cat([each.flatten() for each in (out if isinstance(out, tuple) else (out,))])

    gate = line.name.startswith(("Krea2", "LTX2Attention self apply_gated"))
    (found,) = outcomes(model, call, GATES if gate else {})
    _seen[found.verdict] += 1
    refused = next((each for each in REFUSED if each in line.name), None)
    if refused is not None:
        assert found.verdict in ("refused", "without ports"), found
        assert REFUSED[refused] in found.detail
        return
    assert found.verdict == ("gated" if gate else "equal"), found
    assert edits_differ(model, "attn", by_hand(model.attn, line), flat) == []


def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        listed = ", ".join(f"{count} {verdict}" for verdict, count in _seen.items())
        print(f"\n{_seen.total()} attentions of diffusers: {listed}")
    assert not _seen["wrong"]
