"""Sizes that are equal by chance decide nothing: what is recorded then is what is recorded anyway.

Every module of a model is recorded in a call in which rows, tokens, heads, experts or features are
as many, and in one in which they are not: both agree, or the first is refused.
"""

from typing import Any, NamedTuple

import pytest
import torch
from oracle.positions import first_tensor
from tiny import decoders

import dreamreader as dr
from dreamreader.engine.ports import can_run
from dreamreader.errors import DreamreaderError

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
    return torch.allclose(a[1:rows], b[1:rows, :tokens], rtol=1e-3, atol=1e-3)


def difference(got: dr.Activation, wanted: dr.Activation) -> str:
    """Why two recordings do not agree where both have own tokens; empty where they do."""
    if got.axes != wanted.axes or got.tensor.shape[3:] != wanted.tensor.shape[3:]:
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
    arguments, other = inputs(each_name, equal), Sizes(3, equal.tokens + 3, equal.source)
    if not is_causal(model, arguments, inputs(each_name, other)):
        other = other._replace(tokens=equal.tokens)
    found = recorded(reader, sites, arguments)
    sites = [site for site in sites if not isinstance(found[site], Exception)]
    assert sites
    truth = recorded(reader, sites, inputs(each_name, other))
    wrong = []
    for site in sites:
        got, true = found[site], truth[site]
        why = str(true) if isinstance(true, Exception) else difference(got, true)
        wrong += [f"{site}: {why}"] if why else []
    assert not wrong, "\n".join(wrong)
