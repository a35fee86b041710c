"""Every edit against the same change by hand, on a real attention output of a tiny pipeline."""

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import pytest
import tiny
import torch
from torch import Tensor

from dreamreader.edits import Ablate, Clamp, Edit, Patch, Scale, Steer
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName

SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
WIDTH = 32
ROWS = 3
PROMPTS = ["a red cat", "a dog", "a blue tree"]


@cache
def reader() -> Reader:
    return Reader(tiny.pipeline("sd"))


def run(*edits: Any, record: Any = (), **kw: Any) -> Any:
    arguments = {"seeds": 5, "output_type": "latent", **tiny.arguments("sd", 2), **kw}
    return reader().run(PROMPTS, edits=edits, record=record, **arguments)


@cache
def plain() -> Any:
    return run(record=[SITE, f"{SITE}:heads"])


def values(*edits: Any, site: str = SITE) -> tuple[Tensor, Tensor]:
    """Values in the first step, without and with edits; [rows, branches, tokens, ...]."""
    after = run(*edits, record=site).cache[site].tensor[:, :, 0]
    return plain().cache[site].tensor[:, :, 0], after


def direction(seed: int = 0) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def unit(v: Tensor) -> Tensor:
    return v / v.norm()


V = direction()
BASIS = torch.linalg.qr(torch.stack([direction(s) for s in (1, 2, 3)]).T)[0].T

BY_HAND: list[tuple[str, Any, Callable[[Tensor], Tensor]]] = [
    ("steer", Steer(SITE, V, 2.0), lambda x: x + 2 * V),
    ("steer back", Steer(SITE, V, -0.5), lambda x: x - 0.5 * V),
    (
        "steer, norm kept",
        Steer(SITE, V, 3.0, norm_match=True),
        lambda x: _like(x + 3 * V, x),
    ),
    (
        "steer back, norm kept",
        Steer(SITE, V, -3.0, norm_match=True),
        lambda x: _like(x - 3 * V, x),
    ),
    ("scale", Scale(SITE, -1.5), lambda x: -1.5 * x),
    ("clamp", Clamp(SITE, -0.1, 0.2), lambda x: x.clamp(-0.1, 0.2)),
    ("clamp above", Clamp(SITE, hi=0.0), lambda x: x.clamp(max=0.0)),
    (
        "clamp a component",
        Clamp(SITE, -0.05, 0.05, direction=V),
        lambda x: x + ((x @ unit(V)).clamp(-0.05, 0.05) - x @ unit(V))[..., None] * unit(V),
    ),
    ("zero", Ablate(SITE), torch.zeros_like),
    ("half", Ablate(SITE, strength=0.5), lambda x: 0.5 * x),
    ("mean", Ablate(SITE, "mean", source=V), lambda x: V.expand_as(x)),
    (
        "project",
        Ablate(SITE, "project", direction=V),
        lambda x: x - (x @ unit(V))[..., None] * unit(V),
    ),
    (
        "project beyond, norm kept",
        Ablate(SITE, "project", direction=V, strength=-0.5, norm_match=True),
        lambda x: _like(x + 0.5 * (x @ unit(V))[..., None] * unit(V), x),
    ),
    (
        "project one side",
        Ablate(SITE, "project", direction=V, one_sided=True),
        lambda x: x - (x @ unit(V)).clamp(min=0)[..., None] * unit(V),
    ),
    (
        "project a subspace",
        Ablate(SITE, "project", direction=torch.stack([direction(s) for s in (1, 2, 3)])),
        lambda x: x - x @ BASIS.T @ BASIS,
    ),
    ("patch", Patch(SITE, V), lambda x: V.expand_as(x)),
    ("patch a share", Patch(SITE, V, strength=0.25), lambda x: 0.75 * x + 0.25 * V),
    ("function", Edit(SITE, lambda x: x.flip(1) * 2), lambda x: x.flip(2) * 2),
    ("channels", Scale(SITE, 0.0, channels=[0, 5]), lambda x: _channels(x, [0, 5])),
]


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y with the norms of x."""
    return y * x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True)


def _channels(x: Tensor, off: list[int]) -> Tensor:
    y = x.clone()
    y[..., off] = 0
    return y


@pytest.mark.parametrize(("name", "edit", "by_hand"), BY_HAND, ids=[each[0] for each in BY_HAND])
def test_edit_equals_the_change_by_hand(name: str, edit: Any, by_hand: Any) -> None:
    before, after = values(edit)
    torch.testing.assert_close(after, by_hand(before), rtol=1e-5, atol=1e-6)
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    "edit",
    [
        Steer(SITE, V, 0.0),
        Steer(SITE, V, 0.0, norm_match=True),
        Steer(SITE, V, 2.0, steps=[]),
        Steer(SITE, V, 2.0, timesteps=set()),
        Scale(SITE, 1.0),
        Ablate(SITE, strength=0.0),
        Ablate(SITE, "project", direction=torch.zeros(0, WIDTH)),
        Ablate(SITE, "noise", sigma=0.0),
        Clamp(SITE, -1e30, 1e30),
        Patch(SITE, [0, 1, 2]),
        Edit(SITE, lambda x: None),
        Edit(SITE, lambda x: x),
    ],
    ids=lambda edit: edit.describe(),
)
def test_identities_are_bit_equal_to_no_edit(edit: Any) -> None:
    result = run(edit, record=SITE)
    assert torch.equal(result.images, plain().images)
    assert torch.equal(result.cache[SITE].tensor, plain().cache[SITE].tensor)


def test_patching_a_run_into_itself_is_bit_equal() -> None:
    cache = plain().cache
    for edit in (Patch(SITE, cache), Patch(f"{SITE}:heads", cache), Patch(SITE, cache[SITE])):
        assert torch.equal(run(edit).images, plain().images)


@pytest.mark.parametrize(
    ("name", "site"),
    [("sd", SITE), ("lumina2", "transformer.noise_refiner.0")],
    ids=["two evaluations of a step", "one call for each branch"],
)
def test_each_call_of_a_run_takes_its_own_value_of_a_cache(name: str, site: str) -> None:
    pipe = tiny.pipeline(name)
    if name == "sd":
        pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    subject, kw = Reader(pipe), {**tiny.arguments(name, 3), "output_type": "latent"}
    if name == "lumina2":
        kw["negative_prompt"] = "a tree"
    source = subject.run("a red cat", record=site, seeds=1, **kw).cache
    patched = subject.run("a red dog", Patch(site, source), record=site, seeds=2, **kw).cache
    own = subject.run("a red dog", record=site, seeds=2, **kw).cache
    wanted = source[site].tensor.flatten(0, 2).unique(dim=0)
    assert len(wanted) == source[site].tensor.shape[1] * source[site].tensor.shape[2]
    assert torch.equal(patched[site].tensor, source[site].tensor)
    assert not torch.equal(own[site].tensor, source[site].tensor)


@pytest.mark.parametrize(
    "edit",
    [
        Steer(SITE, V, 3.0, rows=1),
        Steer(SITE, V, [0.0, 3.0, 0.0]),
        Scale(SITE, [1.0, 0.0, 1.0]),
        Ablate(SITE, strength=[0.0, 1.0, 0.0]),
        Ablate(SITE, "noise", rows=[1], sigma=2.0),
        Clamp(SITE, -0.01, 0.01, rows=slice(1, 2)),
        Patch(SITE, 0, rows=1),
        Edit(SITE, lambda x: x * 0, rows=torch.tensor([False, True, False])),
    ],
    ids=lambda edit: edit.describe(),
)
def test_editing_one_row_leaves_the_others_bit_equal(edit: Any) -> None:
    result = run(edit)
    assert torch.equal(result.images[[0, 2]], plain().images[[0, 2]])
    assert not torch.equal(result.images[1], plain().images[1])
    assert result.firing[0].rows == {1}


def test_each_row_has_its_own_strength() -> None:
    before, after = values(Steer(SITE, V, [0.0, 1.0, -2.0]))
    expected = before + torch.tensor([0.0, 1.0, -2.0]).reshape(3, 1, 1, 1) * V
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_values_for_each_row_say_how_many_there_are(count: int) -> None:
    wanted = {"alpha": count} if count > 1 else {}
    for alpha in ([0.5] * count, (0.5,) * count, torch.full((count,), 0.5)):
        assert Steer(SITE, V, alpha).row_lengths() == wanted
    assert Steer(SITE, V, torch.tensor(0.5)).row_lengths() == {}


def test_edits_of_one_site_compose_in_the_order_given() -> None:
    steer, scale = Steer(SITE, V, 2.0), Scale(SITE, 3.0)
    before, one = values(steer, scale)
    _, other = values(scale, steer)
    torch.testing.assert_close(one, 3 * (before + 2 * V))
    torch.testing.assert_close(other, 3 * before + 2 * V)


def test_several_edits_of_a_site_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamreader.engine import _compile as compile

    passes: list[int] = []

    def counted(intervene: Any) -> Any:
        def call(x: Tensor, program: Any, *rest: Any) -> Tensor:
            passes.append(len(program))
            return intervene(x, program, *rest)

        return call

    for name in ("intervene", "intervene_seen"):
        monkeypatch.setattr(compile, name, counted(getattr(compile, name)))
    edits = [Steer(SITE, V, 2.0), Scale(SITE, 3.0), Ablate(SITE, "project", direction=V)]
    run(*edits)
    # the first call also runs each edit alone, to see whether it changes anything
    assert passes == [3, 1, 1, 1, 3]


def test_norm_match_means_the_norm_before_its_own_edit() -> None:
    before, after = values(Scale(SITE, 2.0), Steer(SITE, V, 1.0, norm_match=True))
    torch.testing.assert_close(after.norm(dim=-1), 2 * before.norm(dim=-1))


def test_heads_are_edited_apart() -> None:
    site = f"{SITE}:heads"
    before, after = values(Ablate(site, heads=[1]), site=site)
    assert torch.equal(after[..., 0, :], before[..., 0, :])
    assert torch.equal(after[..., 1, :], torch.zeros_like(after[..., 1, :]))
    small = torch.randn(16)
    before, after = values(Steer(site, small, 2.0, heads=0), site=site)
    torch.testing.assert_close(after[..., 0, :], before[..., 0, :] + 2 * small)
    assert torch.equal(after[..., 1, :], before[..., 1, :])
    both = torch.randn(2, 16)
    before, after = values(Steer(site, both), site=site)
    torch.testing.assert_close(after, before + both)


def test_heads_of_a_site_without_heads_are_refused() -> None:
    with pytest.raises(
        InvalidInput, match="has no heads; heads=\\[1\\] needs the port q, k, v or heads"
    ):
        run(Ablate(SITE, heads=[1]))
    with pytest.raises(InvalidInput, match="heads at .*: 2 asked for, there are 2"):
        run(Ablate(f"{SITE}:heads", heads=[2]))


def test_inputs_and_deltas_are_edited() -> None:
    block = SITE.removesuffix(".attn2")
    recorded = run(record=[f"{block}:in", block, f"{block}:delta"]).cache
    inside, out, delta = (
        recorded[each].tensor[:, :, 0] for each in (f"{block}:in", block, f"{block}:delta")
    )
    assert torch.equal(delta, out - inside)
    cache = run(Scale(f"{block}:delta", 0.0), record=block).cache
    torch.testing.assert_close(cache[block].tensor[:, :, 0], inside)
    cache = run(Steer(f"{block}:in", V, 2.0), record=f"{block}:in").cache
    torch.testing.assert_close(cache[f"{block}:in"].tensor[:, :, 0], inside + 2 * V)


def test_feature_maps_are_edited_per_place() -> None:
    site = "unet.mid_block.resnets.0"
    before = run(record=site).cache[site]
    mask = torch.zeros(4, 6)
    mask[1, 2] = 1
    after = run(Steer(site, V, 1.0, tokens=mask), record=site).cache[site]
    change = (after.grid - before.grid)[:, :, 0]
    torch.testing.assert_close(change[:, :, 1, 2], V.expand(ROWS, 2, -1))
    change[:, :, 1, 2] = 0
    assert not change.any()


def test_patch_takes_each_row_from_the_row_that_is_named() -> None:
    cache = plain().cache
    before, after = values(Patch(SITE, cache, from_rows=[2, 0, 1]))
    assert torch.equal(after, before[[2, 0, 1]])
    before, after = values(Patch(SITE, 2))
    assert torch.equal(after, before[[2, 2, 2]])
    before, after = values(Patch(SITE, [1, 0, 2]))
    assert torch.equal(after, before[[1, 0, 2]])


def test_a_source_that_lacks_step_or_branch_is_refused() -> None:
    found = plain().cache[SITE]
    with pytest.raises(
        InvalidInput, match="source has no step 0 \\(it has 1\\).*limit the edit with steps"
    ):
        run(Patch(SITE, found.select(step=1)))
    with pytest.raises(InvalidInput, match="has the branches cond, uncond is edited too"):
        run(Patch(SITE, found.select(branch="cond")))
    ours = run(Patch(SITE, found.select(branch="cond", step=1), branch="cond", steps=1))
    assert torch.equal(ours.images, plain().images)


def test_mean_ablation_is_by_position() -> None:
    cache = plain().cache
    before, after = values(Ablate(SITE, "mean", source=cache))
    torch.testing.assert_close(after, before.mean(0, keepdim=True).expand_as(after))


def test_resampling_takes_another_row_whatever_the_batch() -> None:
    cache = plain().cache
    edit = Ablate(SITE, "resample", source=cache, seed=3)
    before, after = values(edit)
    donors = [
        next(d for d in range(ROWS) if torch.equal(after[row], before[d])) for row in range(ROWS)
    ]
    assert all(donor != row for row, donor in enumerate(donors))
    split = run(edit, record=SITE, batch_size=1).cache[SITE].tensor[:, :, 0]
    torch.testing.assert_close(split, after, rtol=1e-5, atol=1e-6)


def test_resampling_never_takes_the_row_itself() -> None:
    subject, x = Reader(torch.nn.Sequential(torch.nn.Linear(4, 4))), torch.randn(3, 5, 4)
    with subject.recording("0") as cache:
        before = subject.subject(x)
    donors = set()
    for seed in range(20):
        with subject.editing(Ablate("0", "resample", source=cache, seed=seed)):
            after = subject.subject(x)
        donors |= {(r, d) for r in range(3) for d in range(3) if torch.equal(after[r], before[d])}
    assert donors == {(r, d) for r in range(3) for d in range(3) if r != d}


def test_noise_of_a_row_does_not_depend_on_the_batch() -> None:
    edit = Ablate(SITE, "noise", sigma=0.5, seed=9)
    before, after = values(edit)
    noise = (after - before) / 0.5
    assert 0.9 < noise.std() < 1.1
    assert abs(float(noise.mean())) < 0.1
    split = run(edit, record=SITE, batch_size=2).cache[SITE].tensor[:, :, 0]
    torch.testing.assert_close(split, after, rtol=1e-4, atol=1e-5)


def test_directions_may_differ_by_step_and_by_site() -> None:
    table = torch.stack([V, 3 * V])
    result = run(Steer(SITE, table), record=SITE).cache[SITE].tensor
    first = plain().cache[SITE].tensor[:, :, 0] + V
    torch.testing.assert_close(result[:, :, 0], first)
    by_site = {SITE: V, f"{SITE}:heads": 2 * V}
    sites = [SITE, f"{SITE}:heads"]
    _, heads = values(Steer(sites, by_site), site=f"{SITE}:heads")
    expected = plain().cache[f"{SITE}:heads"].tensor[:, :, 0].flatten(-2) + 2 * V
    torch.testing.assert_close(heads.flatten(-2), expected)
    with pytest.raises(UnknownName, match="direction for site"):
        run(Steer(SITE, {f"{SITE}:heads": V}))


def test_functions_are_told_where_they_are() -> None:
    seen: list[Any] = []

    def look(x: Tensor, place: Any) -> None:
        seen.append((tuple(x.shape), place.site, place.branches, place.instant.step, place.hw))

    run(Edit(f"{SITE}:heads", look, branch="cond"))
    assert seen == [
        ((3, 24, 2, 16), f"{SITE}:heads", ("uncond", "cond"), step, (4, 6)) for step in (0, 1)
    ]
    with pytest.raises(
        InvalidInput, match=r"fn gave torch.float32 \[6, 24, 31\], .* \[6, 24, 32\] is needed"
    ):
        run(Edit(SITE, lambda x: x[..., 1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(64, 64).to(dtype)
    holder = Reader(torch.nn.Sequential(layer))
    x = torch.randn(2, 7, 64, dtype=dtype)
    v = torch.randn(64)
    plain_out = layer(x)
    with holder.editing([Steer("0", v, 0.3), Scale("0", 1.7)]):
        out = holder.subject(x)
    assert out.dtype == dtype and layer.weight.dtype == dtype
    expected = ((plain_out.float() + 0.3 * v) * 1.7).to(dtype)
    assert torch.equal(out, expected)


def test_gradients_flow_through_edits() -> None:
    layer = torch.nn.Linear(4, 4).double()
    reader = Reader(torch.nn.Sequential(layer))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    v = torch.randn(4, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([0.5, 0.0], dtype=torch.float64, requires_grad=True)
    with reader.editing([Steer("0", v, alpha), Scale("0", 2.0)]):
        reader.subject(x).sum().backward()
    plain_sum = (2 * (layer(x) + alpha.detach()[:, None, None] * v)).sum()
    weight_grad = torch.autograd.grad(plain_sum, layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, weight_grad)
    torch.testing.assert_close(v.grad, torch.full((4,), 2.0 * 3 * 0.5, dtype=torch.float64))
    torch.testing.assert_close(alpha.grad, (2 * 3 * v.sum()).detach().expand(2))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Steer(SITE, torch.tensor([1.0, torch.nan])),
            "direction has 1 of 2 values that are not finite",
        ),
        (lambda: Steer(SITE, V, float("inf")), "alpha has 1 of 1 values that are not finite"),
        (lambda: Steer(SITE, [1.0, 2.0]), "direction must be a tensor"),
        (lambda: Scale(SITE, float("nan")), "factor has 1 of 1"),
        (lambda: Clamp(SITE), "needs lo, hi or both"),
        (lambda: Clamp(SITE, 0.0, direction=torch.zeros(4)), "direction is zero"),
        (lambda: Ablate(SITE, "mean"), "kind 'mean' needs source"),
        (lambda: Ablate(SITE, "project"), "kind 'project' needs direction"),
        (lambda: Ablate(SITE, source=V), "kind 'zero' takes no source"),
        (lambda: Patch(SITE, torch.full((3,), torch.nan)), "source has 3 of 3"),
        (lambda: Steer([], V), "the list of sites is empty"),
        (
            lambda: Steer(SITE, V, steps=1.5),
            "steps must be a number, slice, range, set or predicate",
        ),
        (lambda: Steer("unet..x", V), "the path has an empty part"),
    ],
)
def test_wrong_inputs_are_refused_when_the_edit_is_made(make: Any, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        make()


def test_unknown_ablation_names_the_kinds() -> None:
    with pytest.raises(UnknownName, match="unknown kind of ablation 'mena'; nearest: mean"):
        Ablate(SITE, "mena")


def test_edits_compare_by_value() -> None:
    assert Steer(SITE, V, 2.0) == Steer(SITE, V.clone(), 2.0)
    assert Steer(SITE, V, 2.0) != Steer(SITE, V + 1, 2.0)
    assert Steer(SITE, V) != Scale(SITE)
    assert len({Steer(SITE, V), Steer(SITE, V.clone())}) == 1


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("Scale: factor", lambda value: Scale(SITE, value)),
        ("Clamp: lo", lambda value: Clamp(SITE, lo=value)),
        ("Clamp: hi", lambda value: Clamp(SITE, hi=value)),
    ],
)
def test_a_number_that_cannot_be_learned_is_named(name, make) -> None:
    with pytest.raises(InvalidInput, match=f"{name} requires grad and gets no gradient; detach"):
        make(torch.tensor(2.0, requires_grad=True))
