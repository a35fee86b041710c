"""Every attention class of transformers that builds small: its ports against their meaning.

Layouts of their own always, of the rest another part each day; all of them with `-m matrix`.
"""

from collections import Counter
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import decoders, encoders
from torch import Tensor, nn

from .attention_ports import ByHand, Gate, Outcome, edits_differ, outcomes

HEADS = 4


def build(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model of a class, and a call that gives its first tensor."""
    if name in decoders.names():
        model = decoders.build(name)
        rng = torch.Generator().manual_seed(0)
        ids = torch.randint(3, decoders.WORDS, (2, 7), generator=rng)
        inputs = {"input_ids": ids, "use_cache": False}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids[:, :5]
    else:
        model = encoders.build(name)
        inputs = encoders.inputs(model)

    def call() -> Any:
        torch.manual_seed(0)  # some draw which patches to leave out
        return model(**inputs)[0]

    return model, call


def _own(out: Tensor, heads: int = HEADS) -> Tensor:
    """A gate's projection by heads: [.., heads, d], or [.., heads, 1] where it has one for each."""
    return out.unflatten(-1, (heads, -1))


def _sigmoid(part: str) -> Gate:
    return Gate(part, lambda out, mixed, heads: torch.sigmoid(_own(out)))


def _beside_query(out: Tensor, mixed: Tensor, heads: Tensor) -> Tensor:
    return torch.sigmoid(out.unflatten(-1, (HEADS, 2, -1))[..., 1, :])


def _one_for_each_head(out: None, mixed: Tensor, heads: Tensor) -> Tensor:
    """The factor that fits best, which has to lie between 0 and 1."""
    factor = (mixed * heads).sum(-1, keepdim=True) / (mixed**2).sum(-1, keepdim=True)
    assert bool(((factor > 0) & (factor < 1)).all())
    return factor


GATES = {
    "AfmoeAttention": _sigmoid("gate_proj"),
    "GraniteMoeSWAAttention": Gate(None, _one_for_each_head),
    "GraniteSWAAttention": Gate(None, _one_for_each_head),
    "LagunaAttention": Gate("g_proj", lambda out, mixed, heads: F.softplus(_own(out))),
    "Lfm3Attention": _sigmoid("g_proj"),
    "Qwen3NextAttention": Gate("q_proj", _beside_query),
    "Qwen3_5Attention": Gate("q_proj", _beside_query),
    "Qwen3_5MoeAttention": Gate("q_proj", _beside_query),
    "Qwen4ExpTextAttention": Gate("q_proj", _beside_query),
}

# Names of q, k, v and of what reads the heads; "": the module itself gives them.
SEPARATE = (
    "q_proj k_proj v_proj o_proj", "q_proj k_proj v_proj out_proj", "q_proj k_proj v_proj dense",
    "q_proj k_proj v_proj Wo", "q_proj k_proj v_proj projection_layer", "q k v o",
    "query key value dense", "query key value", "q_lin k_lin v_lin out_lin", "Wq Wk Wv dense",
    "query_proj key_proj value_proj out_proj",
)  # fmt: skip
# The fused projection, what reads the heads, and how the projection lies.
FUSED = {
    "BloomAttention": "query_key_value dense heads",
    "CodeGenAttention": "qkv_proj out_proj shares",
    "DbrxAttention": "Wqkv out_proj blocks",
    "FalconAttention": "query_key_value dense groups",
    "GPT2Attention": "c_attn c_proj blocks",
    "GPTBigCodeAttention": "c_attn c_proj blocks",
    "GPTNeoXAttention": "query_key_value dense heads",
    "GPTNeoXJapaneseAttention": "query_key_value dense heads",
    "ImageGPTAttention": "c_attn c_proj blocks",
    "ModernBertAttention": "Wqkv Wo blocks",
    "MptAttention": "Wqkv out_proj blocks",
    "PersimmonAttention": "query_key_value dense heads",
    "Phi3Attention": "qkv_proj o_proj blocks",
    "Attention": "c_attn c_proj blocks",  # of GPT-1
}
MULTI_HEAD = {"FalconForCausalLM, ALiBi", "GPTBigCodeForCausalLM, multi-head"}


def by_hand(module: nn.Module, multi_head: bool) -> dict[str, ByHand]:
    """Head 0 of every port of a module: the first features of each projection, or of its share."""
    kind = type(module).__name__
    if kind in FUSED:
        fused, output, lies = FUSED[kind].split()
        return _of_fused(module, fused, output, "heads" if multi_head else lies)
    if hasattr(module, "kv_b_proj"):
        nope, value = module.qk_nope_head_dim, module.v_head_dim
        query = getattr(module, "q_proj", None) or module.q_b_proj
        return {
            "q": ByHand(query, (slice(nope + module.qk_rope_head_dim),)),
            "k": ByHand(module.kv_b_proj, (slice(nope),)),
            "v": ByHand(module.kv_b_proj, (slice(nope, nope + value),)),
            "heads": ByHand(module.o_proj, (slice(value),), "in"),
        }
    names = next(
        each.split()
        for each in SEPARATE
        if all(isinstance(getattr(module, name, None), nn.Module) for name in each.split())
    )
    q, k, v = (getattr(module, name) for name in names[:3])
    output = getattr(module, names[3]) if len(names) > 3 else None
    width = v.out_features // HEADS if output is None else output.in_features // HEADS
    wide = q.out_features // HEADS // (2 if kind in BESIDE_QUERY else 1)
    ports = {"q": ByHand(q, (slice(wide),)), "k": ByHand(k, (slice(wide),))}
    norm = getattr(module, "v_norm", None)
    ports["v"] = ByHand(v, (slice(width),)) if norm is None else ByHand(norm, (0, slice(None)))
    ports["heads"] = ByHand(output or module, (slice(width),), "out" if output is None else "in")
    if kind == "BitNetAttention":
        ports["heads"] = ByHand(module.attn_sub_norm, (slice(width),), "in")
    return ports


def _of_fused(module: nn.Module, fused: str, output: str, lies: str) -> dict[str, ByHand]:
    projection, reads = module.get_submodule(fused), module.get_submodule(output)
    total = getattr(projection, "nf", None) or projection.out_features
    d = (getattr(reads, "nx", None) or reads.in_features) // HEADS
    key_heads = (total // d - HEADS) // 2
    group = HEADS // key_heads
    first = {
        "blocks": (0, HEADS * d, (HEADS + key_heads) * d),
        "heads": (0, d, 2 * d),
        "groups": (0, group * d, (group + 1) * d),
        "shares": (0, total // 4 * 2 // 3, total // 4 // 3),  # queries, values, keys
    }[lies]
    ports = {
        letter: ByHand(projection, (slice(start, start + d),))
        for letter, start in zip("qkv", first, strict=True)
    }
    return {**ports, "heads": ByHand(reads, (slice(d),), "in")}


BESIDE_QUERY = {kind for kind, gate in GATES.items() if gate.factor is _beside_query}


def check(name: str) -> list[Outcome]:
    """Compare every attention of a model with its meaning, and the edits of each class by hand."""
    model, call = build(name)
    with torch.no_grad():
        call()
    found = outcomes(model, call, GATES)
    wrong = [each for each in found if each.verdict == "wrong"]
    assert not wrong, wrong
    kinds = {each.kind: each.site for each in reversed(found) if each.verdict in ("equal", "gated")}
    for site in kinds.values():
        places = by_hand(model.get_submodule(site), name in MULTI_HEAD)
        assert edits_differ(model, site, places, call) == []
    return found


ALWAYS = {
    "AfmoeForCausalLM", "AlbertForMaskedLM", "BartForConditionalGeneration", "BertForMaskedLM",
    "BitNetForCausalLM", "BloomForCausalLM", "CTRLLMHeadModel", "CodeGenForCausalLM",
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "FalconForCausalLM",
    "FalconForCausalLM, ALiBi", "FalconForCausalLM, two kv heads", "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM", "GPTBigCodeForCausalLM, multi-head", "GPTNeoXForCausalLM",
    "Gemma3nForCausalLM", "Gemma4ForCausalLM", "GptOssForCausalLM", "GraniteSWAForCausalLM",
    "LlamaForCausalLM", "MptForCausalLM", "OpenAIGPTLMHeadModel", "PersimmonForCausalLM",
    "Phi3ForCausalLM", "PhiForCausalLM", "Qwen3NextForCausalLM", "T5ForConditionalGeneration",
    "ViTModel",
}  # fmt: skip
PARTS = 12
_seen: dict[tuple[str, str], str] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        whole = "matrix" in (metafunc.config.getoption("-m") or "")
        today = date.today().toordinal() % PARTS
        named = [*decoders.names(), *encoders.names()]
        chosen = [
            name
            for number, name in enumerate(named)
            if whole or name in ALWAYS or number % PARTS == today
        ]
        metafunc.parametrize("name", chosen)


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_ports_have_their_meaning(name: str) -> None:
    for each in check(name):
        _seen[each.kind, each.verdict] = each.detail


@pytest.mark.matrix
def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(verdict for _, verdict in _seen)
    with capsys.disabled():
        listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        print(f"\n{sum(counts.values())} attention classes of transformers: {listed}, 0 wrong")
    assert counts["equal"] > counts["refused"]
