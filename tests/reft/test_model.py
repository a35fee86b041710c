"""Adapters of several sites: widths, edits, files, what does not fit."""

from pathlib import Path

import pytest
import torch
from reft.subjects import LAYER, SITES, language, pipeline, settings

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, NeverFired, UnknownName
from dreamreader.reft import Reft


def scrambled(reft: Reft) -> Reft:
    for each in reft.parameters():
        torch.nn.init.normal_(each, std=0.1)
    return reft


def test_widths_come_from_the_model_and_parameters_are_counted(capsys: pytest.CaptureFixture[str]):
    reft = Reft.for_sites(pipeline(), "unet.**.attn2", rank=2, **settings())
    assert set(SITES) <= set(reft.sites)
    assert {each.width for each in reft.adapters.values()} == {16, 32}
    Reft({"unet.mid_block": 1280}, rank=32).print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 81,952\n"
    reft.print_trainable_parameters()
    count = sum(2 * 2 * each.width + 2 for each in reft.adapters.values())
    components = pipeline().subject.components.values()
    modules = [each for each in components if isinstance(each, torch.nn.Module)]
    total = sum(each.numel() for part in modules for each in part.parameters())
    said = f"trainable params: {count:,} || all params: {total:,} || trainable%: "
    assert capsys.readouterr().out == f"{said}{100 * count / total:.4f}\n"


@pytest.mark.parametrize("per_step", [None, 3], ids=["one", "each step"])
def test_a_file_gives_the_same_adapters_back(tmp_path: Path, per_step: int | None):
    path = tmp_path / "reft.safetensors"
    ranks = dict(zip(SITES, (2, 3), strict=True))
    widths = dict.fromkeys(SITES, 16) | {SITES[1]: 32}
    reft = scrambled(Reft(widths, ranks, "direft", steps=per_step, tokens=[0, -1]))
    reft.save(path)
    found = Reft.load(path)
    assert found.edits(2.0, branch="cond") == reft.edits(2.0, branch="cond")
    assert found.tokens == [0, -1] and path.stat().st_size < 12_000
    with pytest.raises(InvalidInput, match="holds no edits of dreamreader"):
        from dreamreader import edits

        edits.load(path)


def test_steps_of_rows_choose_adapters_as_a_run_does():
    reader = pipeline()
    reft = scrambled(Reft.for_sites(reader, SITES[1], 2, per_step=3, **settings()))
    asked = {"seeds": 3, "output_type": "latent", **settings()}
    own = reader.run(["a cat", "a dog"], edits=reft.edits(steps=1), **asked).images
    told = reader.run(["a cat", "a dog"], edits=reft.edits(steps=1, at=[1, 1]), **asked).images
    other = reader.run(["a cat", "a dog"], edits=reft.edits(steps=1, at=[1, 2]), **asked).images
    torch.testing.assert_close(own, told)
    torch.testing.assert_close(own[0], other[0])
    assert not torch.allclose(own[1], other[1], rtol=1e-3, atol=1e-4)
    with pytest.raises(InvalidInput, match="at is for adapters of each step"):
        Reft({"0": 4}, 2).edits(at=[0])


@pytest.mark.parametrize("per_step", [None, 2], ids=["one", "each step"])
@pytest.mark.parametrize("variant", ["loreft", "direft", "noreft", "diagonal", "bias"])
def test_edits_are_those_of_now_whatever_is_trained_later(variant: str, per_step: int | None):
    reft = scrambled(Reft({"0": 8}, 2, variant, steps=per_step))
    (edit,) = reft.edits()
    tables = edit.down, edit.bias, edit.up
    then = [each.clone() for each in tables]
    assert not any(each.requires_grad for each in tables)
    scrambled(reft)
    assert all(map(torch.equal, tables, then))
    (later,) = reft.edits()
    assert not torch.equal(later.up, edit.up)


def test_edits_keep_their_graph_on_demand_only():
    reft = Reft({"0": 4}, 2)
    layer = torch.nn.Linear(4, 4)
    reader = Reader(torch.nn.Sequential(layer))
    assert not any(table.requires_grad for edit in reft.edits() for table in (edit.down, edit.up))
    with reader.editing(reft.edits(graph=True)):
        reader.subject(torch.randn(2, 3, 4)).square().sum().backward()
    for name, each in reft.named_parameters():
        assert each.grad is not None and float(each.grad.abs().max()) > 0, name


def test_an_adapter_of_another_model_is_refused():
    reader = language()
    reader.run("a cat", record=LAYER)
    other = Reft({LAYER: 48}, 2)
    with pytest.raises(
        InvalidInput, match=f"{LAYER}: the adapter is for width 48, the site has 32"
    ):
        other.check(reader)
    with pytest.raises(
        InvalidInput, match=f"LoReFT at {LAYER}: made for 48 features, the site has"
    ):
        reader.run("a cat", edits=other.edits())
    with pytest.raises(UnknownName, match="model.layers.7"):
        Reft({"model.layers.7": 32}, 2).check(reader)
    Reft({LAYER: 32}, 2).check(reader)


def test_wrong_inputs_say_what_is_wrong():
    with pytest.raises(InvalidInput, match="Reft: there are no sites"):
        Reft({})
    with pytest.raises(UnknownName, match="unknown rank for site 'b'; nearest: a"):
        Reft({"a": 4, "b": 4}, {"a": 2})
    with pytest.raises(InvalidInput, match="a: rank 5: from 1 to the width, 4, is possible"):
        Reft({"a": 4}, 5)
    with pytest.raises(InvalidInput, match=r"give the widths, Reft\({site: width}\)"):
        Reft.for_sites(Reader(torch.nn.Sequential(torch.nn.Linear(2, 2))), "0")
    with pytest.raises(NeverFired, match="vae.encoder.conv_in"):
        Reft.for_sites(pipeline(), "vae.encoder.conv_in", 2, **settings())
