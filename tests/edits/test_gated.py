"""Removal that keeps norms, per step, and gated addition: by hand, and identities."""

from typing import Any

import pytest
import torch
from edits.test_edits import SITE, WIDTH, direction, plain, run, unit, values
from torch import Tensor

from dreamreader.edits import Ablate, Scale, Steer
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput

V, G = direction(), direction(35)  # tokens lie on both sides of G


def component(x: Tensor, v: Tensor) -> Tensor:
    return (x @ unit(v))[..., None]


def renormed(new: Tensor, old: Tensor) -> Tensor:
    return new * old.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True)


def project(**kw: Any) -> Ablate:
    return Ablate(SITE, "project", direction=V, **kw)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("one_sided", [True, False])
def test_removal_by_hand_then_every_token_has_its_old_norm(strength: float, one_sided: bool):
    before, after = values(project(strength=strength, one_sided=one_sided, norm_match=True))
    c = component(before, V)
    c = c.clamp(min=0) if one_sided else c
    expected = renormed(before - strength * c * unit(V), before)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))


def test_the_norm_is_that_before_its_own_edit():
    before, after = values(Scale(SITE, 2.0), project(norm_match=True))
    torch.testing.assert_close(after.norm(dim=-1), 2 * before.norm(dim=-1))


def test_strength_two_is_a_reflection_and_rescaling_changes_nothing():
    mirror = project(strength=2.0)
    before, after = values(mirror)
    torch.testing.assert_close(component(after, V), -component(before, V))
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    _, kept = values(project(strength=2.0, norm_match=True))
    torch.testing.assert_close(kept, after)
    _, back = values(mirror, mirror)
    torch.testing.assert_close(back, before)
    _, half = values(project(strength=2.0, one_sided=True))
    torch.testing.assert_close(component(half, V), -component(before, V).abs())


def test_a_table_holds_one_direction_for_each_step():
    table = torch.stack([V, torch.zeros(WIDTH)])
    edit = Ablate(SITE, "project", direction=table, per_step=True)
    found = run(edit, record=SITE).cache[SITE].tensor
    _, first = values(project())
    assert torch.equal(found[:, :, 0], first)
    alone = run(project(steps=0), record=SITE)  # zeros remove nothing
    assert torch.equal(found, alone.cache[SITE].tensor)
    planes = torch.stack([torch.stack([V, G]), torch.stack([G, G])])  # [steps, m, features]
    both = run(Ablate(SITE, "project", direction=planes, per_step=True), record=SITE)
    at = both.cache[SITE].tensor
    for step, vectors in ((0, (V, G)), (1, (G,))):
        for v in vectors:
            assert float(component(at[:, :, step], v).abs().max()) < 1e-5
    with pytest.raises(InvalidInput, match="direction at .* holds 1 steps, the running step is 1"):
        run(Ablate(SITE, "project", direction=V[None], per_step=True))


@pytest.mark.parametrize("norm_match", [False, True])
def test_gated_addition_by_hand(norm_match: bool):
    before, after = values(Steer(SITE, V, 3.0, gate=G, norm_match=norm_match))
    share = component(before, G).clamp(min=0)
    expected = before + 3.0 * share * V
    expected = renormed(expected, before) if norm_match else expected
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)
    closed = share[..., 0] == 0
    assert 0.1 < closed.float().mean() < 0.9  # both kinds of tokens are there
    assert torch.equal(after[closed], before[closed])


def test_gated_by_itself_a_direction_is_amplified_where_it_is():
    before, after = values(Steer(SITE, unit(V), 1.5, gate=V))
    _, other = values(project(strength=-1.5, one_sided=True))
    torch.testing.assert_close(after, other)
    torch.testing.assert_close(
        component(after, V), component(before, V) * torch.where(component(before, V) > 0, 2.5, 1.0)
    )


def test_the_gate_may_differ_by_step_and_site_and_see_some_channels():
    gates = torch.stack([G, -G])
    found = run(Steer(SITE, V, 3.0, gate={SITE: gates}), record=SITE).cache[SITE].tensor
    _, first = values(Steer(SITE, V, 3.0, gate=G))
    assert torch.equal(found[:, :, 0], first)
    second = run(
        Steer(SITE, V, 3.0, gate=G, steps=0), Steer(SITE, V, 3.0, gate=-G, steps=1), record=SITE
    )
    assert torch.equal(found, second.cache[SITE].tensor)
    channels = torch.arange(WIDTH) < 8
    for norm_match in (False, True):
        edit = Steer(SITE, V, 3.0, gate=G, channels=channels, norm_match=norm_match)
        before, after = values(edit)
        assert torch.equal(after[..., 8:], before[..., 8:])
        part = before[..., :8]
        expected = part + 3.0 * component(part, G[:8]).clamp(min=0) * V[:8]
        expected = renormed(expected, part) if norm_match else expected
        torch.testing.assert_close(after[..., :8], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "edit",
    [
        Steer(SITE, V, 0.0, gate=G),
        Steer(SITE, V, 0.0, gate=G, norm_match=True),
        project(strength=0.0, norm_match=True),
        Ablate(SITE, "project", direction=torch.zeros(2, WIDTH), per_step=True),
    ],
    ids=lambda edit: edit.describe(),
)
def test_identities_are_bit_equal_to_no_edit(edit: Any):
    result = run(edit, record=SITE)
    assert torch.equal(result.images, plain().images)
    assert torch.equal(result.cache[SITE].tensor, plain().cache[SITE].tensor)


@pytest.mark.parametrize(
    "edit",
    [
        Steer(SITE, V, [0.0, 3.0, 0.0], gate=G),
        Steer(SITE, V, 3.0, gate=G, rows=1),
        project(strength=[0.0, 2.0, 0.0], norm_match=True),
    ],
    ids=lambda edit: edit.describe(),
)
def test_editing_one_row_leaves_the_others_bit_equal(edit: Any):
    result = run(edit)
    assert torch.equal(result.images[[0, 2]], plain().images[[0, 2]])
    assert not torch.equal(result.images[1], plain().images[1])


def test_gradients_flow_through_the_gate():
    torch.manual_seed(1)
    layer = torch.nn.Linear(4, 4).double()
    reader = Reader(torch.nn.Sequential(layer))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    v, g = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    alpha = torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)
    with reader.editing(Steer("0", v, alpha, gate=g)):
        found = reader.subject(x)
    h = layer(x)
    share = (h @ (g / g.norm())).clamp(min=0)[..., None]
    expected = h + alpha[:, None, None] * share * v
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    got, want = (
        torch.autograd.grad((each * weight).sum(), [v, g, alpha, layer.weight], retain_graph=True)
        for each in (found, expected)
    )
    for mine, reference in zip(got, want, strict=True):
        torch.testing.assert_close(mine, reference)
    assert float(want[2][0].abs()) > 0  # a strength learns from 0 on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    layer = torch.nn.Linear(64, 64).to(dtype)
    reader = Reader(torch.nn.Sequential(layer))
    x, v, g = torch.randn(2, 7, 64, dtype=dtype), torch.randn(64), torch.randn(64)
    h = layer(x)
    with reader.editing(Steer("0", v, 0.3, gate=g)):
        out = reader.subject(x)
    share = component(h.float(), g).clamp(min=0)
    torch.testing.assert_close(out, torch.where(share == 0, h, (h + 0.3 * share * v).to(dtype)))
    assert out.dtype == dtype


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Steer(SITE, V, gate=[1.0]), "Steer: gate must be a tensor or a mapping"),
        (lambda: Steer(SITE, V, gate=V / 0), "Steer: gate has 32 of 32 values that are not finite"),
        (
            lambda: Ablate(SITE, norm_match=True),
            "Ablate: norm_match belongs to kind 'project', not 'zero'",
        ),
        (
            lambda: Ablate(SITE, "mean", source=V, per_step=True),
            "Ablate: per_step belongs to kind 'project', not 'mean'",
        ),
        (lambda: run(Steer(SITE, V, gate=V * 0)), f"gate at {SITE} is zero, it opens nowhere"),
        (lambda: run(Steer(SITE, V, gate=V[:5])), "the site has 32 features.*, gate is \\[5\\]"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(make: Any, text: str):
    with pytest.raises(InvalidInput, match=text):
        make()
