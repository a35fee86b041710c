"""Ports that cannot be what they are called are refused with the numbers; gates, sinks, norms."""

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from tiny import decoders
from torch import Tensor, nn

from dreamreader.edits import Ablate
from dreamreader.engine import Reader
from dreamreader.engine._families import attention_facts
from dreamreader.errors import InvalidInput, UnknownName

IDS = torch.tensor([[5, 9, 3, 7, 11, 4]])


def recorded(model: nn.Module, *sites: str) -> list[Tensor]:
    with Reader(model).recording(list(sites)) as cache, torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return [cache[each].tensor[:, 0] for each in sites]


def attention_of(model: nn.Module, kind: str) -> tuple[str, Any]:
    return next((n, m) for n, m in model.named_modules() if type(m).__name__ == kind)


def test_heads_of_a_gated_attention_are_those_of_the_configuration() -> None:
    model = decoders.build("Qwen3NextForCausalLM")
    name, module = attention_of(model, "Qwen3NextAttention")
    site = Reader(model).sites(f"{name}:heads")[0]
    assert site.heads == model.config.num_attention_heads == 4
    q, gated, heads, probs, v = recorded(
        model,
        f"{name}:q",
        f"{name}.q_proj",
        *(f"{name}:{each}" for each in ("heads", "probs", "v")),
    )
    both = gated.unflatten(-1, (4, 2, 8))
    assert torch.equal(q, both[..., 0, :])
    mixed = (probs.transpose(1, 2) @ v.transpose(1, 2).repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(mixed * torch.sigmoid(both[..., 1, :]), heads)

    def first_head(_: nn.Module, args: tuple) -> tuple:
        return (torch.cat([torch.zeros_like(args[0][..., :8]), args[0][..., 8:]], -1),)

    with torch.no_grad():
        handle = module.o_proj.register_forward_pre_hook(first_head)
        expected = model(input_ids=IDS).logits
        handle.remove()
        with Reader(model).editing(Ablate(f"{name}:heads", "zero", heads=[0])):
            assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("name", ["GptOssForCausalLM", "LlamaForCausalLM", "BloomForCausalLM"])
def test_probabilities_are_those_that_the_model_gives(name: str) -> None:
    model = decoders.build(name)
    model.set_attn_implementation("eager")
    layer = {"BloomForCausalLM": "transformer.h.0.self_attention"}.get(
        name, "model.layers.0.self_attn"
    )
    (probs,) = recorded(model, f"{layer}:probs")
    with torch.no_grad():
        own = model(input_ids=IDS, output_attentions=True).attentions[0]
    assert torch.equal(probs.transpose(1, 2), own)  # without the column of the sink
    assert probs.shape[-1] == IDS.shape[1]
    assert bool((probs.sum(-1) < 0.999).all()) == (name == "GptOssForCausalLM")


def test_fused_and_eager_attention_have_the_same_probabilities() -> None:
    found = []
    for implementation in ("eager", "sdpa"):
        model = decoders.build("LlamaForCausalLM")
        model.set_attn_implementation(implementation)
        found += recorded(model, "model.layers.1.self_attn:probs")
    torch.testing.assert_close(found[0], found[1])


def test_attention_that_shows_nothing_is_refused() -> None:
    from transformers import AttentionInterface

    def hidden(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any):
        return value.repeat_interleave(2, 1).transpose(1, 2).contiguous(), None

    AttentionInterface.register("hidden", hidden)
    model = decoders.build("LlamaForCausalLM")
    model.config._attn_implementation = "hidden"
    with pytest.raises(InvalidInput, match="shows no queries and keys.*attn_implementation='sdpa'"):
        recorded(model, "model.layers.0.self_attn:probs")


def test_several_attentions_in_a_module_are_refused() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def twice(*args: Any, **given: Any) -> Any:
        sdpa_attention_forward(*args, **given)
        return sdpa_attention_forward(*args, **given)

    AttentionInterface.register("twice", twice)
    model = decoders.build("LlamaForCausalLM")
    model.config._attn_implementation = "twice"
    with pytest.raises(InvalidInput, match="2 attentions ran inside the module, probs needs one"):
        recorded(model, "model.layers.0.self_attn:probs")


def test_a_softmax_of_something_else_is_no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    model, site = decoders.build("LlamaForCausalLM"), "model.layers.0.self_attn:probs"
    model.set_attn_implementation("eager")
    (plain,) = recorded(model, site)
    eager = modeling_llama.eager_attention_forward

    def scaled(module: nn.Module, query: Tensor, *args: Any, **given: Any) -> Any:
        one = torch.softmax(query, -1).sum(-1, keepdim=True)  # over features
        return eager(module, query * one, *args, **given)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", scaled)
    torch.testing.assert_close(recorded(model, site)[0], plain)


def test_v_is_what_enters_the_attention() -> None:
    model = decoders.build("Gemma3nForCausalLM")
    name, module = attention_of(model, "Gemma3nTextAttention")
    q, k, v, raw = recorded(model, *(f"{name}:{each}" for each in "qkv"), f"{name}.v_proj")
    torch.testing.assert_close(v, module.v_norm(raw.unflatten(-1, (-1, 8))))
    assert not torch.allclose(v, raw.unflatten(-1, (-1, 8)))
    projected = recorded(model, f"{name}.q_proj", f"{name}.k_proj")  # before their norms
    assert torch.equal(q.flatten(-2), projected[0])
    assert torch.equal(k.flatten(-2), projected[1])


def test_layers_that_use_the_keys_of_another_have_none() -> None:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    small = {**decoders.FIELDS["Gemma3nForCausalLM"], **decoders.SIZES}
    small |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    known = {each.name for each in dataclasses.fields(Gemma3nTextConfig)}
    fields = {key: value for key, value in small.items() if key in known}
    config = Gemma3nTextConfig(**{**fields, "num_kv_shared_layers": 2})
    model = Gemma3nForCausalLM(config).eval()
    last = [n for n, m in model.named_modules() if type(m).__name__ == "Gemma3nTextAttention"][-1]
    with pytest.raises(UnknownName, match="no v of its own: it uses that of an earlier layer"):
        Reader(model).sites(f"{last}:v")
    assert Reader(model).sites(f"{last}:heads")[0].heads == 4


def test_values_that_are_changed_on_the_way_are_refused() -> None:
    model = decoders.build("OlmoForCausalLM")
    model.config.clip_qkv = 1.0
    with pytest.raises(UnknownName, match="values are clipped behind the projection"):
        Reader(model).sites("model.layers.0.self_attn:v")
    assert Reader(model).sites("model.layers.0.self_attn:q")
    turned = decoders.build("RoFormerForCausalLM")
    name, module = attention_of(turned, "RoFormerSelfAttention")
    assert Reader(turned).sites(f"{name}:v")
    module.rotary_value = True
    with pytest.raises(UnknownName, match="values are rotated behind the projection"):
        Reader(turned).sites(f"{name}:v")
    scaled = decoders.build("MiMoV2FlashForCausalLM")
    with pytest.raises(UnknownName, match=r"values are scaled behind the projection \(v_scale=0.7"):
        Reader(scaled).sites("model.layers.0.self_attn:v")


def test_sizes_that_disagree_are_refused_with_the_numbers() -> None:
    model = decoders.build("LlamaForCausalLM")
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 64)
    model.model.layers[1].self_attn.k_proj = nn.Linear(32, 24)
    reader = Reader(model)
    for port in ("q", "heads", "probs"):
        with pytest.raises(UnknownName, match="q_proj has 64 features, where 4 heads of 8 are st"):
            reader.sites(f"model.layers.0.self_attn:{port}")
    with pytest.raises(UnknownName, match="k_proj has 24 features, where 2 k heads of 8 are stat"):
        reader.sites("model.layers.1.self_attn:k")
    assert reader.sites("model.layers.1.self_attn:v")[0].heads == 2
    fused = decoders.build("GPTNeoXForCausalLM")
    fused.gpt_neox.layers[0].attention.query_key_value = nn.Linear(32, 64)
    with pytest.raises(UnknownName, match="query_key_value has 64 features, .*which is 96"):
        Reader(fused).sites("gpt_neox.layers.0.attention:q")


def test_a_width_at_the_time_of_the_run_is_checked_too() -> None:
    model = decoders.build("BloomForCausalLM")
    layer = model.transformer.h[0].self_attention

    def cut(_: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out[..., :-1]

    layer.query_key_value.register_forward_hook(cut)
    with pytest.raises(InvalidInput, match="gives 95 features, 4 x 3 x 8 = 96 were expected"):
        recorded(model, "transformer.h.0.self_attention:v")


def test_names_alone_make_no_attention() -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    class GPTBigger(nn.Module):
        """Has the attributes of GPT-2 and is none."""

        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.embed_dim = 4, 32
            self.c_attn, self.c_proj = nn.Linear(32, 96), nn.Linear(32, 32)

    assert attention_facts(GPTBigger()) is None

    class Own(GPT2Attention):
        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return self.c_proj(self.c_attn(hidden_states)[..., :32])

    config = decoders.config("GPT2LMHeadModel")
    assert attention_facts(Own(config)) is None
    plain = attention_facts(GPT2Attention(config))
    assert plain is not None and sorted(plain.ports) == ["heads", "k", "q", "v"]


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("LlamaForCausalLM", "model.layers.{}.self_attn"),
        ("GPTNeoXForCausalLM", "gpt_neox.layers.{}.attention"),
    ],
)
@pytest.mark.parametrize("part", [nn.Linear(32, 32), nn.LayerNorm(32), nn.Parameter(torch.ones(4))])
def test_a_part_that_is_not_known_is_refused(name: str, site: str, part: Any) -> None:
    model = decoders.build(name)
    model.get_submodule(site.format(0)).extra = part
    with pytest.raises(UnknownName, match="its (part|parameter) extra .*is none that is known"):
        Reader(model).sites(f"{site.format(0)}:heads")
    assert len(Reader(model).sites(f"{site.format('*')}:heads")) == decoders.LAYERS - 1


def test_unfused_projections_are_read_again() -> None:
    pipe = tiny.pipeline("sd")
    reader, kw = Reader(pipe), tiny.arguments("sd", 1)
    site = "unet.mid_block.attentions.0.transformer_blocks.0."
    ports = [f"{site}{attn}:{letter}" for attn in ("attn1", "attn2") for letter in "qkv"]

    def record() -> Any:
        return reader.run("a cat", record=ports, seeds=0, output_type="latent", **kw).cache

    before = record()
    pipe.fuse_qkv_projections()
    record()
    pipe.unfuse_qkv_projections()
    after = record()
    for port in ports:
        assert torch.equal(after[port].tensor, before[port].tensor)


def test_heads_need_a_processor_of_diffusers() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Doubled(AttnProcessor2_0):
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
            return super().__call__(attn, hidden_states, *args, **given)

    pipe = tiny.pipeline("sd")
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    attn = pipe.unet.get_submodule(site.removeprefix("unet."))
    attn.set_processor(Doubled())
    reader = Reader(pipe)
    with pytest.raises(UnknownName, match="its processor Doubled is none of diffusers"):
        reader.sites(f"{site}:heads")
    assert reader.sites(f"{site}:q")[0].heads == 2


def test_the_sum_of_two_attentions_has_no_heads() -> None:
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

    both = WanAttention(32, 4, 8, added_kv_proj_dim=32, processor=WanAttnProcessor())
    with pytest.raises(UnknownName, match="reads the sum of two, which holds heads of neither"):
        Reader(nn.ModuleDict({"a": both})).sites("a:heads")
    assert Reader(nn.ModuleDict({"a": both})).sites("a:v")
