"""Every port of every family against a computation by hand from the model's own weights."""

from functools import cache
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamreader.edits import Scale
from dreamreader.engine import Reader
from dreamreader.engine._ports import ports_of
from dreamreader.errors import DreamreaderError, InvalidInput, UnknownName

PROMPTS = ["a red cat", "a dog on a tree"]

# pipeline, attention, order of the joint keys (None: keys of one stream)
ATTENTIONS = [
    ("sd", "unet.mid_block.attentions.0.transformer_blocks.0.attn1", None),
    ("sd", "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2", None),
    ("sdxl", "unet.mid_block.attentions.0.transformer_blocks.1.attn2", None),
    ("sd3", "transformer.transformer_blocks.0.attn", "image text"),
    ("sd3", "transformer.transformer_blocks.1.attn", "image text"),
    ("flux", "transformer.transformer_blocks.0.attn", "text image"),
    ("flux", "transformer.single_transformer_blocks.0.attn", None),
    ("qwen-image", "transformer.transformer_blocks.0.attn", "text image"),
    ("aura-flow", "transformer.joint_transformer_blocks.0.attn", "text image"),
    ("aura-flow", "transformer.single_transformer_blocks.0.attn", None),
    ("pixart-sigma", "transformer.transformer_blocks.0.attn1", None),
    ("pixart-sigma", "transformer.transformer_blocks.1.attn2", None),
    ("sana", "transformer.transformer_blocks.0.attn2", None),
    ("cogview4", "transformer.transformer_blocks.0.attn1", None),
    ("lumina2", "transformer.layers.0.attn", None),
    ("sd", "text_encoder.encoder.layers.0.self_attn", None),
]
IDS = [f"{name}-{site.split('.', 1)[1]}" for name, site, _ in ATTENTIONS]


@cache
def recorded(name: str, site: str) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Module, what the reader recorded at every port, and inputs and results seen by plain hooks.

    One branch, first step: [rows, tokens, ...].
    """
    pipe = tiny.pipeline(name)
    reader = Reader(pipe)
    module = pipe
    for part in site.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    seen: dict[str, list[Any]] = {"in": [], "out": []}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: seen["in"].append((args, kwargs)), with_kwargs=True
        ),
        module.register_forward_hook(lambda _, args, out: seen["out"].append(_copies(out))),
    ]
    ports = [f"{site}:{port}" for port in ports_of(module)]
    from dreamreader.engine import Record

    records = [Record(port, branch="cond") for port in ports]
    result = reader.run(
        PROMPTS, record=records, seeds=0, output_type="latent", **tiny.arguments(name, 2)
    )
    for handle in handles:
        handle.remove()
    values = {port.split(":")[1]: result.cache[port].tensor[:, 0] for port in ports}
    args, kwargs = seen["in"][0]
    given = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
    first = result.cache[ports[0]]
    in_call = {"out": seen["out"][0]} | {
        key: value for key, value in given.items() if isinstance(value, Tensor)
    }
    return module, values, _of_cond(in_call, first.shape[0])


def _copies(out: Any) -> Any:
    return (
        tuple(each.clone() if isinstance(each, Tensor) else each for each in out)
        if isinstance(out, tuple)
        else out.clone()
    )


def _of_cond(values: dict[str, Any], rows: int) -> dict[str, Any]:
    """The conditional rows of a call: the last chunk where both branches are in the batch."""

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(each) for each in value)
        return value[-rows:] if isinstance(value, Tensor) else value

    return {key: cut(value) for key, value in values.items()}


def _project(module: nn.Module, name: str, x: Tensor, heads: int) -> Tensor:
    linear = module.get_submodule(name)
    y = F.linear(x, linear.weight, linear.bias)
    return y.unflatten(-1, (heads, -1))


@pytest.mark.parametrize(("name", "site", "order"), ATTENTIONS, ids=IDS)
def test_out_in_and_delta(name: str, site: str, order: str | None) -> None:
    module, values, seen = recorded(name, site)
    out = seen["out"]
    image = out[0] if isinstance(out, tuple) else out
    assert torch.equal(values["out"], image)
    assert torch.equal(values["in"], seen["hidden_states"])
    assert torch.equal(values["delta"], image - seen["hidden_states"])
    if "out.text" in values and values["out.text"].numel():
        assert torch.equal(values["out.text"], out[1])
        assert torch.equal(values["in.text"], seen["encoder_hidden_states"])


@pytest.mark.parametrize(("name", "site", "order"), ATTENTIONS, ids=IDS)
def test_queries_keys_and_values_are_the_projections(
    name: str, site: str, order: str | None
) -> None:
    module, values, seen = recorded(name, site)
    x = seen["hidden_states"]
    text = seen.get("encoder_hidden_states")
    if name == "cogview4":  # its attention joins the streams itself
        x = torch.cat([text, x], 1)
        text = None
    clip = name == "sd" and site.startswith("text")
    for letter in "qkv":
        cross = text is not None and order is None and letter != "q"
        source = text if cross else x
        projection = f"{letter}_proj" if clip else f"to_{letter}"
        heads = values[letter].shape[-2]
        assert torch.equal(values[letter], _project(module, projection, source, heads))
        if f"{letter}.text" in values:
            assert torch.equal(
                values[f"{letter}.text"], _project(module, f"add_{letter}_proj", text, heads)
            )


@pytest.mark.parametrize(("name", "site", "order"), ATTENTIONS, ids=IDS)
def test_heads_are_what_the_output_projection_reads(
    name: str, site: str, order: str | None
) -> None:
    module, values, seen = recorded(name, site)
    out = seen["out"]
    projection = getattr(module, "out_proj", None) or getattr(module, "to_out", [None])[0]
    flat = values["heads"].flatten(-2)
    result = flat if projection is None else F.linear(flat, projection.weight, projection.bias)
    if name == "cogview4":
        result = result[:, -out[0].shape[1] :]
    result = result / getattr(module, "rescale_output_factor", 1.0)
    expected = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    if "heads.text" in values:
        added = module.to_add_out
        result = F.linear(values["heads.text"].flatten(-2), added.weight, added.bias)
        torch.testing.assert_close(result, out[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "site", "order"), ATTENTIONS, ids=IDS)
def test_probabilities_mix_the_values_into_the_heads(
    name: str, site: str, order: str | None
) -> None:
    module, values, _ = recorded(name, site)
    probs = values["probs"].transpose(1, 2)  # [rows, heads, queries, keys]
    torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))
    parts = {"image": values["v"], "text": values.get("v.text")}
    v = torch.cat([parts[each] for each in order.split()], 1) if order else values["v"]
    v = v.transpose(1, 2)
    v = v.repeat_interleave(probs.shape[1] // v.shape[1], 1)
    mixed = (probs @ v).transpose(1, 2)
    if order and "heads.text" in values:
        both = {"image": values["heads"], "text": values["heads.text"]}
        expected = torch.cat([both[each] for each in order.split()], 1)
    elif order:  # the last block of Stable Diffusion 3 has no text result
        expected, mixed = values["heads"], mixed[:, : values["heads"].shape[1]]
    else:
        expected = values["heads"]
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


def test_probabilities_equal_an_explicit_softmax() -> None:
    module, values, _ = recorded("sd", ATTENTIONS[1][1])
    q, k = (values[letter].transpose(1, 2) for letter in "qk")
    expected = torch.softmax(q @ k.transpose(-1, -2) * module.scale, -1).transpose(1, 2)
    torch.testing.assert_close(values["probs"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", tiny.LANGUAGE_MODELS)
def test_ports_of_language_models(name: str) -> None:
    model, tokenizer = tiny.language_model(name)
    reader = Reader(model, tokenizer)
    layers = {"gpt2": "transformer.h", "gpt-neox": "gpt_neox.layers"}.get(name, "model.layers")
    attn = {"gpt2": "attn", "gpt-neox": "attention"}.get(name, "self_attn")
    site = f"{layers}.1.{attn}"
    module = model.get_submodule(site)
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    sites = [f"{site}:{port}" for port in ("q", "k", "v", "heads", "probs", "out")]
    cache = reader.run("a red cat on a tree", record=sites).cache
    handle.remove()
    found = {
        each: cache[f"{site}:{each}"].tensor[:, 0] for each in ("q", "k", "v", "heads", "probs")
    }
    x, heads = seen[0], 4
    if name == "gpt2":
        fused = x @ module.c_attn.weight + module.c_attn.bias
        q, k, v = (each.unflatten(-1, (heads, -1)) for each in fused.split(32, -1))
        out = module.c_proj(found["heads"].flatten(-2))
    elif name == "gpt-neox":
        fused = F.linear(x, module.query_key_value.weight, module.query_key_value.bias)
        q, k, v = fused.unflatten(-1, (heads, 3, 8)).unbind(-2)
        out = module.dense(found["heads"].flatten(-2))
    else:
        q = _project(module, "q_proj", x, heads)
        k, v = (_project(module, f"{letter}_proj", x, 2) for letter in "kv")
        out = module.o_proj(found["heads"].flatten(-2))
    for letter, expected in (("q", q), ("k", k), ("v", v)):
        torch.testing.assert_close(found[letter], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out, cache[site].tensor[:, 0], rtol=1e-5, atol=1e-6)
    probs = found["probs"].transpose(1, 2)
    assert torch.equal(probs.triu(1), torch.zeros_like(probs)), "attends to later tokens"
    wide = found["v"].transpose(1, 2).repeat_interleave(heads // found["v"].shape[-2], 1)
    mixed = (probs @ wide).transpose(1, 2)
    torch.testing.assert_close(mixed, found["heads"], rtol=1e-4, atol=1e-5)


def test_t5_ports() -> None:
    pipe = tiny.pipeline("pixart-sigma")
    site = "text_encoder.encoder.block.0.layer.0.SelfAttention"
    reader = Reader(pipe)
    ports = [f"{site}:{port}" for port in ("q", "v", "heads", "probs", "in")]
    arguments = tiny.arguments("pixart-sigma", 1)
    cache = reader.run("a red cat", record=ports, output_type="latent", **arguments).cache
    module = pipe.text_encoder.encoder.block[0].layer[0].SelfAttention
    values = {
        port: cache[f"{site}:{port}"].select(branch="cond").tensor[:, 0]
        for port in ("q", "v", "heads", "probs", "in")
    }
    assert torch.equal(values["q"].flatten(-2), module.q(values["in"]))
    mixed = (values["probs"].transpose(1, 2) @ values["v"].transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(mixed, values["heads"], rtol=1e-4, atol=1e-5)


def test_streams_of_one_sequence_are_its_parts() -> None:
    pipe = tiny.pipeline("flux")
    site = "transformer.single_transformer_blocks.0.attn"
    sites = [f"{site}:heads", f"{site}:heads.text", f"{site}:heads.image", f"{site}:out.image"]
    kw = tiny.arguments("flux", 1)
    cache = Reader(pipe).run("a red cat", record=sites, seeds=0, output_type="latent", **kw).cache
    whole, text, image = (cache[each].tensor for each in sites[:3])
    assert torch.equal(whole[:, :, :16], text)
    assert torch.equal(whole[:, :, 16:], image)
    assert cache[sites[2]].hw == (4, 6)
    assert cache[sites[0]].hw is None


def test_streams_of_different_length_in_each_row() -> None:
    pipe = tiny.pipeline("lumina2")
    reader, kw = Reader(pipe), tiny.arguments("lumina2", 1)
    site = "transformer.layers.0.attn"
    from dreamreader.engine import Record

    def record(prompts: list[str]) -> Any:
        records = [Record(f"{site}:q{each}", branch="cond") for each in ("", ".image")]
        return reader.run(prompts, record=records, seeds=0, output_type="latent", **kw).cache

    cache = record(["a cat", "a red dog on a tree"])
    whole, image = cache[f"{site}:q"].tensor[:, 0], cache[f"{site}:q.image"].tensor[:, 0]
    lengths = [whole.shape[1] - 24 - extra for extra in (len("a red dog on a tree".split()) - 2, 0)]
    assert image.shape[1] == 24
    for row, length in enumerate(lengths):
        assert torch.equal(whole[row, length : length + 24], image[row])


def test_a_missing_port_lists_those_that_exist() -> None:
    reader = Reader(tiny.pipeline("sd"))
    with pytest.raises(UnknownName, match="conv_in is a Conv2d and has the ports out, in, delta"):
        reader.sites("unet.conv_in:heads")
    with pytest.raises(UnknownName, match="unknown port 'head'.*heads"):
        reader.sites("unet.conv_in:head")
    sana = Reader(tiny.pipeline("sana"))
    with pytest.raises(UnknownName, match="attention is linear.*has the ports.*q, k, v, heads"):
        sana.sites("transformer.transformer_blocks.0.attn1:probs")
    sd3 = Reader(tiny.pipeline("sd3"))
    with pytest.raises(UnknownName, match="unknown port 'heads.text'"):
        sd3.sites("transformer.transformer_blocks.1.attn:heads.text")


def test_a_list_of_modules_is_no_site() -> None:
    reader = Reader(tiny.pipeline("sd"))
    with pytest.raises(DreamreaderError, match="ModuleList, which is never called.*down_blocks.0"):
        reader.sites("unet.down_blocks")
    assert "unet.down_blocks" not in reader.sites("unet.*").names


def test_probabilities_cannot_be_edited() -> None:
    from dreamreader.edits import Scale

    reader = Reader(tiny.pipeline("sd"))
    edit = Scale("unet.mid_block.attentions.0.transformer_blocks.0.attn2:probs", 2.0)
    with pytest.raises(InvalidInput, match="probs can be recorded, not edited"):
        reader.run("a cat", edits=edit, output_type="latent", **tiny.arguments("sd", 1))


def test_fused_projections_give_the_same_ports() -> None:
    pipe = tiny.pipeline("sd")
    reader, kw = Reader(pipe), tiny.arguments("sd", 1)
    site = "unet.mid_block.attentions.0.transformer_blocks.0."
    ports = [f"{site}{attn}:{letter}" for attn in ("attn1", "attn2") for letter in "qkv"]
    before = reader.run("a cat", record=ports, seeds=0, output_type="latent", **kw).cache
    pipe.fuse_qkv_projections()
    after = reader.run("a cat", record=ports, seeds=0, output_type="latent", **kw).cache
    for port in ports:
        torch.testing.assert_close(after[port].tensor, before[port].tensor, rtol=1e-4, atol=1e-5)


def test_an_edit_of_a_share_leaves_the_result_of_the_projection_alone() -> None:
    model, tokenizer = tiny.language_model("gpt2")
    reader, seen = Reader(model, tokenizer), []
    attention = model.transformer.h[0].attn
    handle = attention.c_attn.register_forward_hook(lambda m, a, y: seen.append((y, y.clone())))
    try:
        with reader.editing(Scale("transformer.h.0.attn:q", 3.0)):
            model(**tokenizer("a red cat", return_tensors="pt"))
    finally:
        handle.remove()
    assert len(seen) == 1 and torch.equal(*seen[0])
