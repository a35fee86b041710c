"""Checkpoints that pyreft itself wrote, against what it makes of an input."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.reft import from_pyreft
from dreamreader.reft.pyreft import householder

KEPT = Path(__file__).with_name("pyreft")
SITES = {
    "model.layers.0": "layer_0_comp_block_output_unit_pos_nunit_1#0",
    "model.layers.1.mlp": "comp_model_layers[1]_mlp_output_unit_pos_nunit_1#0",
}


@cache
def reader() -> Reader:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=32, num_attention_heads=2, num_key_value_heads=2, **sizes)
    return Reader(LlamaForCausalLM(config))


@pytest.mark.parametrize("kind", ["loreft", "loreft-bfloat16", "direft", "noreft"])
def test_an_adapter_does_what_pyreft_does(kind: str):
    reft = from_pyreft(KEPT / kind, reader(), tokens=[0, -1])
    expected = load_file(KEPT / kind / "expected.safetensors")
    assert reft.variant == kind.partition("-")[0] and reft.tokens == [0, -1]
    assert set(reft.sites) == set(SITES)
    for site, key in SITES.items():
        with torch.no_grad():
            found = reft.adapters[site](expected["input"])
        change = (expected[key] - expected["input"]).float().abs().max()
        assert float(change) > 0.1
        # their half precision rounds in the middle too
        rounding = 0.05 if kind.endswith("bfloat16") else 2e-6
        torch.testing.assert_close(found, expected[key], rtol=rounding, atol=rounding)


def test_the_householder_form_is_that_of_torch():
    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(4, 16, bias=False))
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(16, 4))
    state = layer.state_dict()
    found = householder(
        state["parametrizations.weight.original"], state["parametrizations.weight.0.base"]
    )
    torch.testing.assert_close(found, layer.weight.detach())


def test_wrong_inputs_say_what_is_wrong(tmp_path: Path):
    with pytest.raises(InvalidInput, match="has no config.json"):
        from_pyreft(tmp_path, reader())
    home = tmp_path / "copy"
    shutil.copytree(KEPT / "loreft", home)
    config = json.loads((home / "config.json").read_text())
    file = home / f"intkey_{SITES['model.layers.0']}.bin"

    def written(**changes: object) -> Path:
        (home / "config.json").write_text(json.dumps(config | changes))
        return home

    direft = ["<class 'pyreft.interventions.DireftIntervention'>"] * 2
    with pytest.raises(InvalidInput, match="holds no intervention of the kind direft"):
        from_pyreft(written(intervention_types=direft), reader())
    other = ["<class 'pyreft.interventions.ConsreftIntervention'>"] * 2
    with pytest.raises(InvalidInput, match="interventions are ConsreftIntervention; one kind of"):
        from_pyreft(written(intervention_types=other), reader())
    with pytest.raises(InvalidInput, match="has no layer 7 with block_output"):
        from_pyreft(written(representations=[[7, "block_output", "pos", 1]]), reader())
    with pytest.raises(InvalidInput, match="component 'head_query' is not known"):
        from_pyreft(written(representations=[[0, "head_query", "pos", 1]]), reader())
    with pytest.raises(UnknownName, match="model.layers.9"):
        from_pyreft(written(representations=[[0, "model.layers[9].output", "pos", 1]]), reader())
    file.write_bytes(b"no file of torch")
    with pytest.raises(InvalidInput, match="holds no intervention of the kind loreft"):
        from_pyreft(written(), reader())
    file.unlink()
    with pytest.raises(InvalidInput, match=r"intkey_layer_0_comp_block_output.* is missing in"):
        from_pyreft(written(), reader())
