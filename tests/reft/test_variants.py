"""Each variant against its formula in plain torch; orthonormal rows; identity at the start."""

import pytest
import torch
from reft.subjects import LAYER, SITES, language, pipeline, settings
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.reft import VARIANTS, Adapter, Reft

WIDTH, RANK = 12, 3
each_variant = pytest.mark.parametrize("variant", list(VARIANTS))


def scrambled(variant: str, **kw) -> Adapter:
    adapter = Adapter("0", WIDTH, RANK, variant, **kw)
    for each in adapter.parameters():
        torch.nn.init.normal_(each)
    return adapter


def rotation(x: Tensor) -> Tensor:
    """Rows made orthonormal by Gram-Schmidt, one after another."""
    rows: list[Tensor] = []
    for row in x:
        rest = row - sum((row @ each) * each for each in rows)
        rows.append(rest / rest.norm())
    return torch.stack(rows)


def formula(p: dict[str, Tensor], variant: str, h: Tensor) -> Tensor:
    if variant == "bias":
        return h + p["shift"]
    if variant == "diagonal":
        return h + p["scale"] * h + p["shift"]
    wanted = h @ p["weight"].T + p["bias"]
    if variant == "noreft":
        return h + (wanted - h @ p["projection"].T) @ p["projection"]
    r = rotation(p["rotation"])
    return h + (wanted - h @ r.T if variant == "loreft" else wanted) @ r


@each_variant
def test_the_formula_in_plain_torch_with_gradients(variant: str):
    adapter = scrambled(variant)
    h = torch.randn(2, 5, WIDTH, requires_grad=True)
    parameters = {name: each[0] for name, each in adapter.named_parameters()}
    found, wanted = adapter(h), formula(parameters, variant, h)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    weight, inputs = torch.randn(2, 5, WIDTH), [h, *adapter.parameters()]
    got, want = (torch.autograd.grad((y * weight).sum(), inputs) for y in (found, wanted))
    for mine, reference in zip(got, want, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4)


def test_loreft_puts_the_wanted_values_into_its_subspace_and_leaves_the_rest():
    adapter, h = scrambled("loreft"), torch.randn(1, 7, WIDTH)
    r, change = adapter.tables()[2][0], adapter(h) - h
    wanted = h @ adapter.weight[0].T + adapter.bias[0]
    torch.testing.assert_close(adapter(h) @ r.T, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(change - change @ r.T @ r, torch.zeros_like(h), rtol=0, atol=1e-5)


@each_variant
def test_each_step_takes_its_own_adapter(variant: str):
    adapter, h = scrambled(variant, steps=3), torch.randn(3, 5, WIDTH)
    found = adapter(h, [2, 0, 2])
    for row, step in enumerate([2, 0, 2]):
        one = {name: each[step] for name, each in adapter.named_parameters()}
        wanted = formula(one, variant, h[row])
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInput, match=r"0: has adapters for steps 0 .. 2, asked for \[3"):
        adapter(h, [3, 0, 0])


@each_variant
@pytest.mark.parametrize("per_step", [None, 3], ids=["one", "each step"])
def test_at_the_start_nothing_changes_bit_for_bit(variant: str, per_step: int | None):
    reader = pipeline()
    reft = Reft.for_sites(reader, SITES, 4, variant, per_step=per_step, **settings())
    asked = {"seeds": 3, "output_type": "latent", **settings()}
    plain = reader.run("a red cat", **asked).images
    assert torch.equal(reader.run("a red cat", edits=reft.edits(), **asked).images, plain)
    for each in reft.parameters():
        torch.nn.init.normal_(each, std=0.1)
    assert not torch.equal(reader.run("a red cat", edits=reft.edits(), **asked).images, plain)


@each_variant
def test_at_the_start_nothing_changes_in_a_language_model(variant: str):
    reader = language()
    reft = Reft.for_sites(reader, "model.layers.*", 4, variant)
    assert reft.sites == ("model.layers.0", LAYER, "model.layers.2")
    plain = reader.run("a red cat").output.logits
    assert torch.equal(reader.run("a red cat", edits=reft.edits()).output.logits, plain)
    for each in reft.parameters():
        torch.nn.init.normal_(each)
    assert not torch.equal(reader.run("a red cat", edits=reft.edits()).output.logits, plain)


@pytest.mark.parametrize("variant", ["loreft", "direft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_stay_orthonormal_after_every_step_of_the_optimiser(variant: str, dtype: torch.dtype):
    adapter = Adapter("0", 64, 16, variant, steps=2)
    adapter.to(dtype)  # a model in half precision does not make the rotation worse
    assert {each.dtype for each in adapter.parameters()} == {torch.float32}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    h, target = torch.randn(2, 2, 30, 64).to(dtype)
    for _ in range(30):
        optimizer.zero_grad()
        (adapter(h, [0, 1]).float() - target.float()).square().mean().backward()
        optimizer.step()
        r = adapter.tables()[2].detach().double()
        assert float((r @ r.mT - torch.eye(16)).abs().max()) < 1e-6


def test_the_initialisations_by_name():
    h = torch.randn(1, 5, WIDTH)
    zero = Adapter("0", WIDTH, RANK, init="zero")
    r = zero.tables()[2][0]
    torch.testing.assert_close(zero(h), h - h @ r.T @ r)
    drawn = Adapter("0", WIDTH, RANK, init="pyreft")
    assert 0.1 < float(drawn.weight.detach().abs().max()) < WIDTH**-0.5
    assert float(drawn.bias.detach().abs().min()) > 0
    with pytest.raises(UnknownName, match="unknown initialisation 'identify'; nearest: identity"):
        Adapter("0", WIDTH, RANK, init="identify")


def test_tables_are_made_once_while_nothing_changes():
    adapter = Adapter("0", WIDTH, RANK)
    with torch.no_grad():
        first = adapter.tables()
        assert adapter.tables() is first
        adapter.weight.add_(1)
        assert not torch.equal(adapter.tables()[0], first[0])


def test_wrong_inputs_say_what_is_wrong():
    with pytest.raises(InvalidInput, match="0: rank 257: from 1 to 256 is possible"):
        Adapter("0", 512, 257)
    with pytest.raises(InvalidInput, match="0: rank 13: from 1 to the width, 12, is possible"):
        Adapter("0", WIDTH, 13)
    with pytest.raises(UnknownName, match="unknown variant 'loraft'; nearest: loreft"):
        Adapter("0", WIDTH, RANK, "loraft")
    with pytest.raises(InvalidInput, match="0: steps must be at least 1, got 0"):
        Adapter("0", WIDTH, RANK, steps=0)
