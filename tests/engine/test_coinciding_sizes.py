"""Sizes that are equal by chance decide nothing: what is recorded then is what is recorded anyway.

Every module of a model is recorded in a call in which rows, tokens, heads, experts or features are
as many, and in one in which they are not: both agree, or the first is refused.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from oracle.positions import first_tensor
from tiny import decoders
from torch import Tensor, nn

import dreamreader as dr
from dreamreader.engine._ports import can_run
from dreamreader.errors import ClockUnknown, DreamreaderError, InvalidInput

USED = (
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
    "MixtralForCausalLM",
    "Llama4ForCausalLM",
    "InklingForCausalLM",
    "BloomForCausalLM",
    "MambaForCausalLM",
    "XLNetLMHeadModel",
    "T5ForConditionalGeneration",
    "FSMTForConditionalGeneration",
    "EncoderDecoderModel",
    "ProphetNetForConditionalGeneration",
)
WIDTH = 32  # features of the models


class Sizes(NamedTuple):
    """Rows, tokens, and tokens of the encoder."""

    rows: int
    tokens: int
    source: int


EQUAL = (Sizes(4, 4, 4), Sizes(2, WIDTH, WIDTH))  # 4: heads and experts of the models too


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "each_name" in metafunc.fixturenames:
        everything = "matrix" in (metafunc.config.getoption("-m") or "")
        metafunc.parametrize("each_name", decoders.names() if everything else USED)


def inputs(name: str, sizes: Sizes) -> dict[str, Any]:
    """A batch whose first row has padding; a smaller one is a part of a larger one."""
    ids = (torch.arange(5 * 48).view(5, 48) * 7 % 43 + 3)[: sizes.rows]
    if decoders.kind(name) == "causal":
        ids, mask = ids[:, : sizes.tokens].clone(), torch.ones(sizes.rows, sizes.tokens).long()
        ids[0, 0] = mask[0, 0] = 0
        return {"input_ids": ids, "attention_mask": mask}
    source, mask = ids[:, : sizes.source].clone(), torch.ones(sizes.rows, sizes.source).long()
    source[0, -1] = mask[0, -1] = 0
    return {
        "input_ids": source,
        "attention_mask": mask,
        "decoder_input_ids": ids[:, : sizes.tokens],
        "use_cache": False,
    }


def recorded(reader: dr.Reader, sites: list[str], arguments: dict[str, Any]) -> dict[str, Any]:
    """What is recorded at every site, or the error."""
    found: dict[str, Any] = {}
    left = list(sites)
    while left:
        try:
            with torch.no_grad(), reader.recording(left) as cache:
                reader.subject(**arguments)
            return found | {site: cache[site] for site in left}
        except DreamreaderError as error:
            named = [site for site in left if _names(str(error), site)]
            assert named, error
            site = max(named, key=len)
            found[site] = error
            left.remove(site)
    return found


def _names(text: str, site: str) -> bool:
    return any(f"{before}{site}{after}" in f" {text} " for before in " " for after in ": ")


def is_causal(model: Any, few: dict[str, Any], many: dict[str, Any]) -> bool:
    """Whether more tokens behind them leave the results of the first as they are."""
    with torch.no_grad():
        a, b = (first_tensor(model(**each).logits) for each in (few, many))
    assert a is not None and b is not None
    rows, tokens = min(len(a), len(b)), a.shape[1]
    return torch.allclose(a[:rows, 1:], b[:rows, 1:tokens], rtol=1e-3, atol=1e-3)


def difference(got: dr.Activation, wanted: dr.Activation) -> str:
    """Why two recordings do not agree where both have own tokens; empty where they do."""
    sizes, others = got.shape[3:], wanted.shape[3:]
    keys = (sizes[-1], others[-1]) == (got.shape[2], wanted.shape[2])  # as many as tokens
    if got.axes != wanted.axes or (sizes != others and not keys):
        return f"{got.axes} of {list(got.shape)} instead of {wanted.axes} of {list(wanted.shape)}"
    both = [slice(min(a, b)) for a, b in zip(got.shape, wanted.shape, strict=True)]
    mine, theirs = got.tensor[both], wanted.tensor[both]
    if got.positions is not None:
        if wanted.positions is None:
            return "tokens are told that are unknown"
        own = got.positions[both[:3]]
        if not torch.equal(own, wanted.positions[both[:3]]):
            return "other tokens"
        mine, theirs = mine[own >= 0], theirs[own >= 0]
    same = torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)
    return "" if same else f"other values of {list(got.shape)}"


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("equal", EQUAL, ids=str)
def test_equal_sizes_change_nothing(each_name: str, equal: Sizes) -> None:
    model = decoders.build(each_name)
    reader = dr.Reader(model)
    sites = [name for name, module in model.named_modules() if name and can_run(module)]
    # some models fill up to a multiple of four tokens
    arguments, other = inputs(each_name, equal), Sizes(3, equal.tokens + 8, equal.source)
    if not is_causal(model, arguments, inputs(each_name, other)):
        other = other._replace(tokens=equal.tokens)
    found = recorded(reader, sites, arguments)
    sites = [site for site in sites if not isinstance(found[site], Exception)]
    assert sites
    truth = recorded(reader, sites, inputs(each_name, other))
    wrong = []
    for site in sites:
        got, true = found[site], truth[site]
        if not got.tensor.is_floating_point():
            continue  # numbers of tokens that were chosen among others
        why = str(true) if isinstance(true, Exception) else difference(got, true)
        wrong += [f"{site}: {why}"] if why else []
    assert not wrong, "\n".join(wrong)


def hooked(model: Any, site: str, arguments: dict[str, Any]) -> Tensor:
    """What a module gives, by a hook made by hand."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        found = first_tensor(output)
        assert found is not None
        seen.append(found)

    handle = model.get_submodule(site).register_forward_hook(keep)
    with torch.no_grad():
        model(**arguments)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("name", "site", "turned"),
    [
        ("XLNetLMHeadModel", "transformer.layer.1", (1, 0, 2)),
        ("XLNetLMHeadModel", "transformer.layer.0.ff.layer_1", (1, 0, 2)),
        ("XLNetLMHeadModel", "lm_loss", (0, 1, 2)),
        ("FSMTForConditionalGeneration", "model.decoder.layers.1.fc1", (1, 0, 2)),
        ("FSMTForConditionalGeneration", "model.encoder.layers.1", (1, 0, 2)),
        ("FSMTForConditionalGeneration", "model.encoder", (0, 1, 2)),
        ("LEDForConditionalGeneration", "led.encoder.layers.0.self_attn", (0, 1, 2)),
        ("Qwen3ForCausalLM", "model.layers.1.self_attn.q_norm", (0, 1, 2, 3)),
        ("Gemma3ForCausalLM", "model.layers.1.self_attn.q_norm", (0, 2, 1, 3)),
    ],
)
def test_four_rows_of_four_tokens_are_read_and_edited_as_hooks_see_them(
    name: str, site: str, turned: tuple[int, ...]
) -> None:
    model = decoders.build(name)
    arguments = inputs(name, Sizes(4, 4, 4)) | {"attention_mask": torch.ones(4, 4).long()}
    seen = hooked(model, site, arguments)
    with torch.no_grad(), dr.Reader(model).recording(site) as cache:
        model(**arguments)
    assert torch.equal(cache[site].tensor[:, 0], seen.permute(turned))
    push = torch.ones(seen.shape[-1])
    edit = dr.Steer(site, push, 1.0, rows=[1], tokens=[2])
    with torch.no_grad(), dr.Reader(model).editing(edit):
        moved = hooked(model, site, arguments).permute(turned) - seen.permute(turned)
    hit = moved.flatten(2).abs().amax(-1) > 0
    assert hit.nonzero().tolist() == [[1, 2]]


class Turned(nn.Module):
    """A block with tokens first."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def test_code_of_others_is_refused_where_rows_and_tokens_are_as_many() -> None:
    model = decoders.build("LlamaForCausalLM")
    model.model.layers[0].mlp = Turned(model.model.layers[0].mlp.up_proj)
    model.model.layers[0].mlp.inner = nn.Linear(WIDTH, WIDTH)
    site = "model.layers.0.mlp.inner"
    arguments = inputs("LlamaForCausalLM", Sizes(4, 4, 4))
    reader = dr.Reader(model)
    with pytest.raises(InvalidInput, match=r"\[4, 4, 32\].*rows, which tokens"):
        with torch.no_grad(), reader.recording(site):
            model(**arguments)
    with torch.no_grad(), reader.recording(dr.Record(site, layout="tokens rows features")) as cache:
        model(**arguments)
    seen = hooked(model, site, arguments).transpose(0, 1)
    assert torch.equal(cache[site].tensor[:, 0], seen)


def pictures_and_text() -> Any:
    """A model with a tower for pictures of four patches."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision = transformers.CLIPVisionConfig(
        **sizes, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16
    )
    text = decoders.config("LlamaForCausalLM")
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=47)
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("part", ["vision_tower.encoder.layers.0", "multi_modal_projector"])
def test_as_many_pictures_as_rows_are_not_taken_for_rows(part: str) -> None:
    model, site = pictures_and_text(), f"model.{part}"
    ids = torch.arange(16).view(2, 8) + 3
    ids[0] = 47  # both pictures are of the first row
    arguments = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
    reader = dr.Reader(model)
    with pytest.raises(ClockUnknown, match=r"which of its 2 entries are which row.*layout="):
        with torch.no_grad(), reader.recording(site):
            model(**arguments)
    with torch.no_grad(), reader.recording(dr.Record(site, layout="rows tokens features")) as cache:
        model(**arguments)  # who says so
    assert cache[site].positions is None and len(cache[site].rows) == 2
    with torch.no_grad(), reader.recording("model.language_model.layers.0") as cache:
        model(**arguments)
    assert cache["model.language_model.layers.0"].positions is not None


def test_what_is_sorted_by_expert_has_no_rows() -> None:
    model, site = decoders.build("Llama4ForCausalLM"), "model.layers.0.feed_forward.experts.act_fn"
    reader = dr.Reader(model)
    with pytest.raises(ClockUnknown, match="sorted by expert"):
        with torch.no_grad(), reader.recording(site):
            model(**inputs("Llama4ForCausalLM", Sizes(4, 4, 4)))


@pytest.mark.parametrize("given", [{}, {"tokens": -1}])
def test_what_stands_between_encoder_and_decoder_is_of_neither(given: dict[str, Any]) -> None:
    model, site = projected(), "enc_to_dec_proj"
    arguments = inputs("EncoderDecoderModel", Sizes(2, 5, 5))
    with pytest.raises(ClockUnknown, match=r"5 tokens may be those of the encoder"):
        with torch.no_grad(), dr.Reader(model).recording(dr.Record(site, **given)):
            model(**arguments)
    with pytest.raises(ClockUnknown):
        with torch.no_grad(), dr.Reader(model).editing(dr.Steer(site, torch.ones(WIDTH), 1.0)):
            model(**arguments)


def projected() -> Any:
    """An encoder that is narrower than the decoder that reads it."""
    config = decoders.config("EncoderDecoderModel")
    config.encoder.hidden_size = 16
    torch.manual_seed(0)
    return transformers.EncoderDecoderModel(config).eval()


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [
        (0, [0, 1, 2, 3]),
        (2, [2, 3]),
        (slice(1, 3), [1, 2]),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([False, True, True, False]), [1, 2]),
        (np.array([1, 2]), [1, 2]),
        (np.int64(2), None),  # one token, whose dimension goes
        (torch.tensor([3, 2, 1, 0]), None),  # as many as there are
    ],
    ids=repr,
)
def test_tokens_that_logits_to_keep_leaves_are_those_of_the_head(chosen: Any, kept: Any) -> None:
    model = decoders.build("LlamaForCausalLM")
    arguments = {"input_ids": inputs("LlamaForCausalLM", Sizes(3, 4, 0))["input_ids"]}
    with torch.no_grad(), dr.Reader(model).recording(["lm_head", "model"]) as cache:
        model(**arguments, logits_to_keep=chosen)
    found, inner = cache["lm_head"], cache["model"].positions
    assert inner is not None and inner[0, 0].tolist() == [0, 1, 2, 3]
    if kept is None:
        assert found.positions is None
        return
    assert found.positions is not None and found.positions[0, 0].tolist() == kept
    whole = hooked(model, "lm_head", arguments)
    assert torch.allclose(found.tensor[:, 0], whole[:, kept], atol=1e-5)


def test_what_stands_between_encoder_and_decoder_may_be_of_either() -> None:
    small = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.BertConfig(hidden_size=16, intermediate_size=16, **small)
    decoder = transformers.BertConfig(hidden_size=WIDTH, intermediate_size=16, **small)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    site, model = "enc_to_dec_proj", transformers.EncoderDecoderModel(config).eval()
    ids = torch.arange(3, 7).view(1, 4)
    found = recorded(dr.Reader(model), [site], {"input_ids": ids, "decoder_input_ids": ids[:, 1:]})
    assert found[site].shape == (1, 1, 4, WIDTH) and found[site].positions is None
    found = recorded(dr.Reader(model), [site], {"input_ids": ids, "decoder_input_ids": ids})
    assert "its 4 tokens may be those of the encoder or of the decoder" in str(found[site])
