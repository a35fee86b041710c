"""Guidance by probes on a tiny pipeline: by hand, row by row, and what must not happen."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from edits.test_edits import SITE, WIDTH, plain, run, values
from torch import Tensor

from dreamreader import edits
from dreamreader.edits import Mlp, ProbeGuidance, Scale
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName

LABELS = ("red", "blue", "big", "small")


@cache
def probe(width: int = WIDTH, seed: int = 0, **kw: Any) -> Mlp:
    g = torch.Generator().manual_seed(seed)
    sizes = [width, 24, 16, len(LABELS)]
    weights = [
        torch.randn(o, i, generator=g) / i**0.5 for i, o in zip(sizes, sizes[1:], strict=False)
    ]
    biases = [torch.randn(o, generator=g) * 0.1 for o in sizes[1:]]
    return Mlp(weights, biases, labels=LABELS, **{"activation": "gelu", **kw})


def by_hand(x: Tensor, c: list[float], alpha: float, mlp: Mlp | None = None, **kw: Any) -> Tensor:
    """One step: x - alpha grad (sum_k c_k z_k), by autograd."""
    h = x.clone().requires_grad_()
    z = (mlp or probe()).logits(h, **kw)
    (gradient,) = torch.autograd.grad((z * torch.tensor(c)).sum(), h)
    return x - alpha * gradient


def guided(*args: Any, **kw: Any) -> ProbeGuidance:
    return ProbeGuidance(SITE, probe(), *args, **kw)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "avoid", "c"),
    [
        ("red", None, [-1, 0, 0, 0]),
        (None, "blue", [0, 1, 0, 0]),
        ({"red", "big"}, 1, [-0.5, 1, -0.5, 0]),  # two labels at once
        ([["red", 2]], {"blue", "small"}, [-0.5, 0.5, -0.5, 0.5]),
        (frozenset({0}), [{1, 2, 3}], [-1, 1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_one_step_by_hand(target: Any, avoid: Any, c: list[float]):
    before, after = values(guided(target, avoid, 0.5))
    close(after, by_hand(before, c, 0.5))
    assert not torch.equal(after, before)


def test_every_row_has_its_own_labels_and_strength():
    edit = guided(["red", ["blue", "big"], None], [None, 0, None], [0.2, 1.0, 0.0])
    before, after = values(edit)
    close(after[0], by_hand(before[0], [-1, 0, 0, 0], 0.2))
    close(after[1], by_hand(before[1], [1, -0.5, -0.5, 0], 1.0))
    assert torch.equal(after[2], before[2])


def test_inner_steps_repeat_one_step_with_fading_strength():
    before, after = values(guided("red", alpha=0.4, iterations=3, gamma=0.5))
    expected = before
    for alpha in (0.4, 0.2, 0.1):
        expected = by_hand(expected, [-1, 0, 0, 0], alpha)
    close(after, expected)


@pytest.mark.parametrize("pool", ["token", "mean", "flat"])
@pytest.mark.parametrize("trust", [None, 0.05], ids=str)
def test_any_function_is_guided_as_an_mlp(pool: str, trust: float | None):
    tokens = plain().cache[SITE].tensor.shape[3]
    mlp = probe(WIDTH * tokens if pool == "flat" else WIDTH)
    kw = {"alpha": [0.5, 0.1, 0.0], "iterations": 2, "trust": trust, "pool": pool, "branch": "cond"}
    found = values(ProbeGuidance(SITE, mlp, [0, {1, 2}, 3], [1, None, None], **kw))[1]
    other = values(ProbeGuidance(SITE, mlp.logits, [0, {1, 2}, 3], [1, None, None], **kw))[1]
    torch.testing.assert_close(other, found, rtol=1e-4, atol=1e-6)
    assert not torch.equal(found, plain().cache[SITE].tensor[:, :, 0])


@pytest.mark.parametrize("given", [probe(), probe().logits], ids=["mlp", "function"])
def test_the_change_stays_in_the_trust_region(given: Any):
    edit = ProbeGuidance(SITE, given, 0, alpha=100.0, iterations=4, trust=0.1)
    before, after = values(edit)
    share = (after - before).norm(dim=-1) / before.norm(dim=-1)
    torch.testing.assert_close(share, torch.full_like(share, 0.1), rtol=1e-4, atol=0)


def test_the_mean_of_the_selected_tokens_moves_and_they_with_it():
    edit = guided("red", alpha=0.7, pool="mean", tokens=slice(1, 3), branch="cond")
    before, after = values(edit)
    mean = before[:, :, 1:3].mean(2)
    change = (by_hand(mean, [-1, 0, 0, 0], 0.7) - mean)[:, :, None]
    rows, branches = after.shape[:2]
    on = torch.zeros(rows, branches, after.shape[2], dtype=torch.bool)
    on[:, plain().cache[SITE].branches.index("cond"), 1:3] = True
    close(after, torch.where(on[..., None], before + change, before))
    assert torch.equal(after[~on], before[~on])


def test_tokens_that_are_half_selected_count_and_move_half():
    share = torch.linspace(0, 1, plain().cache[SITE].tensor.shape[3])
    before, after = values(guided("red", alpha=0.7, pool="mean", tokens=share))
    mean = (before * share[:, None]).sum(2) / share.sum()
    change = (by_hand(mean, [-1, 0, 0, 0], 0.7) - mean)[:, :, None]
    close(after, before + share[:, None] * change)
    assert torch.equal(after[:, :, 0], before[:, :, 0])


def test_a_flat_probe_reads_the_whole_site():
    tokens = plain().cache[SITE].tensor.shape[3]
    mlp = probe(WIDTH * tokens)
    before, after = values(ProbeGuidance(SITE, mlp, avoid="small", alpha=2.0, pool="flat"))
    close(after.flatten(2), by_hand(before.flatten(2), [0, 0, 0, 1], 2.0, mlp))


def at_steps(edit: ProbeGuidance) -> list[Tensor]:
    """The edited site at each of the two steps, from the value that the first edit left."""
    return list(run(edit, record=SITE).cache[SITE].tensor.unbind(2))


def before_step(step: int, *first: Any) -> Tensor:
    return run(*first, record=SITE).cache[SITE].tensor[:, :, step]


def test_one_probe_for_each_step_and_none_beyond():
    other = probe(seed=1)
    first, second = at_steps(ProbeGuidance(SITE, [probe(), other], "red"))
    close(first, by_hand(before_step(0), [-1, 0, 0, 0], 1.0))
    close(second, by_hand(before_step(1, guided("red", steps=0)), [-1, 0, 0, 0], 1.0, other))
    with pytest.raises(InvalidInput, match="probe at .* holds 1 steps, the running step is 1"):
        run(ProbeGuidance(SITE, [probe()], "red"))
    named = [probe(steps=(1,)), probe(seed=1, steps=(0,))]
    assert torch.equal(
        at_steps(ProbeGuidance(SITE, named, "red"))[0],
        values(ProbeGuidance(SITE, other, "red"))[1],
    )
    with pytest.raises(InvalidInput, match="holds for steps 1, the running step is 0"):
        run(ProbeGuidance(SITE, named[0], "red"))
    run(ProbeGuidance(SITE, named[0], "red", steps=1))


def test_the_schedule_scales_alpha_step_by_step():
    first, second = at_steps(guided("red", alpha=0.5, schedule=[0.0, 2.0]))
    assert torch.equal(first, before_step(0))
    close(second, by_hand(before_step(1), [-1, 0, 0, 0], 1.0))
    with pytest.raises(InvalidInput, match="schedule at .* holds 1 steps, the running step is 1"):
        run(guided("red", schedule=[1.0]))


def test_a_probe_hears_of_the_noise_level():
    mlp = probe(noise=3 * torch.randn(24, 3, generator=torch.Generator().manual_seed(3)))
    first, second = at_steps(ProbeGuidance(SITE, mlp, "red"))
    close(first, by_hand(before_step(0), [-1, 0, 0, 0], 1.0, mlp, fraction=0.0))
    begun = before_step(1, ProbeGuidance(SITE, mlp, "red", steps=0))
    close(second, by_hand(begun, [-1, 0, 0, 0], 1.0, mlp, fraction=0.5))
    assert not torch.allclose(second, by_hand(begun, [-1, 0, 0, 0], 1.0, mlp, fraction=0.0))


def test_a_mapping_gives_each_site_its_probe():
    sites = [SITE, SITE.replace("attn2", "attn1")]
    mapped = ProbeGuidance(sites, {sites[0]: probe(), sites[1]: probe(seed=1).logits}, avoid=0)
    single = [ProbeGuidance(sites[0], probe(), avoid=0)]
    single.append(ProbeGuidance(sites[1], probe(seed=1).logits, avoid=0))
    found, want = run(mapped, record=sites), run(*single, record=sites)
    for site in sites:
        assert torch.equal(found.cache[site].tensor, want.cache[site].tensor)


@pytest.mark.parametrize("given", [probe(), probe().logits], ids=["mlp", "function"])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_what_is_not_moved_stays_bit_equal(given: Any, pool: str):
    for kw in ({"alpha": 0.0}, {"steps": []}, {"schedule": [0.0, 0.0]}):
        result = run(ProbeGuidance(SITE, given, 0, pool=pool, **kw))
        assert torch.equal(result.images, plain().images)
    for kw in ({"alpha": [0.0, 1.0, 0.0]}, {"rows": 1}):
        result = run(ProbeGuidance(SITE, given, 0, pool=pool, iterations=2, **kw))
        assert torch.equal(result.images[[0, 2]], plain().images[[0, 2]])
        assert not torch.equal(result.images[1], plain().images[1])


@pytest.mark.parametrize("pool", ["token", "mean", "flat"])
def test_a_row_alone_is_that_row_in_a_batch(pool: str):
    model = torch.nn.Sequential(torch.nn.Identity())
    mlp, x = probe(5 * WIDTH if pool == "flat" else WIDTH), torch.randn(3, 5, WIDTH)
    targets, alphas = ["red", "blue", {"big", "small"}], [0.5, 1.0, 2.0]

    def edited(x: Tensor, target: Any, alpha: Any) -> Tensor:
        kw = {"avoid": None, "alpha": alpha, "iterations": 3, "trust": 0.5, "pool": pool}
        with Reader(model).editing(ProbeGuidance("0", mlp, target, **kw)):
            return model(x)

    together = edited(x, targets, alphas)
    for row in range(3):
        alone = edited(x[row : row + 1], targets[row], alphas[row])
        assert torch.equal(alone[0], together[row])


def test_rows_keep_their_labels_when_a_run_is_split():
    edit = guided(["red", "blue", {"big", "small"}], alpha=[0.5, 1.0, 2.0])
    together = run(edit, record=SITE).cache[SITE].tensor[:, :, 0]
    for size in (1, 2):
        apart = run(edit, record=SITE, batch_size=size).cache[SITE].tensor[:, :, 0]
        torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_the_report_names_rows_branches_and_steps():
    line = run(guided("red", alpha=[0.0, 1.0, 0.0], branch="cond", steps=1)).firing.firings[0]
    assert line.rows == {1} and set(line.branches) == {"cond"} and dict(line.steps) == {1: 1}
    assert not line.notes


def test_no_graph_and_no_switch_is_left_behind():
    seen = []

    def logits(h: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), h.requires_grad, h.is_inference()))
        return probe().logits(h)

    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH))
    x = torch.randn(2, 3, WIDTH)
    edit = ProbeGuidance("0", logits, 0, iterations=2)
    with Reader(model).editing(edit), torch.inference_mode():
        found = model(x)
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    with Reader(model).editing(edit), torch.no_grad():
        assert torch.equal(model(x), found)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and not found.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(seen) == {(True, True, False)}


@pytest.mark.parametrize("pool", ["token", "mean", "flat"])
@pytest.mark.parametrize("given", ["mlp", "function"])
def test_gradients_flow_to_the_activation(pool: str, given: str):
    g = torch.Generator().manual_seed(0)
    width = 12 if pool == "flat" else 4
    sizes = [(6, width), (3, 6)]
    mlp = Mlp(
        [torch.randn(s, generator=g, dtype=torch.float64) for s in sizes],
        [torch.randn(s[0], generator=g, dtype=torch.float64) for s in sizes],
        "silu",
    )
    model = torch.nn.Sequential(torch.nn.Identity())
    found = mlp if given == "mlp" else mlp.logits
    edit = ProbeGuidance("0", found, [0, {1, 2}], alpha=[0.3, 0.6], iterations=2, pool=pool)

    def edited(x: Tensor) -> Tensor:
        with Reader(model).editing(edit):
            return model(x * 1)

    x = torch.randn(2, 3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(edited, [x])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, pool: str):
    model = torch.nn.Sequential(torch.nn.Identity())
    x = torch.randn(2, 5, WIDTH, dtype=dtype)
    with Reader(model).editing(ProbeGuidance("0", probe(), "red", pool=pool)):
        found = model(x)
    wide = x.float() if pool == "token" else x.float().mean(1, keepdim=True)
    change = by_hand(wide, [-1, 0, 0, 0], 1.0) - wide
    torch.testing.assert_close(found, (x.float() + change).to(dtype), rtol=0, atol=0.02)
    assert found.dtype == dtype


def test_it_comes_back_from_a_file_as_it_was(tmp_path: Path):
    listed = [
        guided(
            {"red", "big"}, ["blue", None, 3], [0.5, 1.0, 2.0], trust=0.1, iterations=3, gamma=0.9
        ),
        ProbeGuidance(SITE, [probe(), probe(seed=1, steps=(0, 2))], 0, schedule=[1.0, 0.5]),
        ProbeGuidance(SITE, {SITE: probe(noise=torch.ones(24, 3))}, avoid=[[0, 1]], pool="mean"),
    ]
    edits.save(tmp_path / "edits", listed)
    found = edits.load(tmp_path / "edits")
    assert found == listed and found[0].probe == probe() and found[0].probe != probe(seed=1)
    assert torch.equal(run(found[0]).images, run(listed[0]).images)
    with pytest.raises(InvalidInput, match="probe cannot be saved: method"):
        edits.save(tmp_path / "other", ProbeGuidance(SITE, probe().logits, 0))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: guided(), "give labels as target, as avoid, or as both"),
        (lambda: guided([None, set()]), "give labels as target, as avoid, or as both"),
        (lambda: guided(4), r"label 4 is out of range, the probe has 4 \(red, blue, big, small\)"),
        (lambda: guided(-1), "label -1 is out of range"),
        (lambda: guided(True), "label True is out of range"),
        (lambda: guided(1.5), "a label is a name or an index, got 1.5"),
        (lambda: guided("red", alpha=torch.nan), "ProbeGuidance: alpha has 1 of 1 values that are"),
        (lambda: guided("red", schedule=[torch.inf]), "ProbeGuidance: schedule has 1 of 1 values"),
        (lambda: guided("red", iterations=0), "iterations must be 1 or more, got 0"),
        (lambda: guided("red", trust=-1.0), "trust must be 0 or more, got -1.0"),
        (lambda: guided("red", pool="flat", tokens=0), "pool 'flat' moves the whole site"),
        (lambda: guided(0, alpha=torch.ones(1, requires_grad=True)), "alpha requires grad"),
        (lambda: ProbeGuidance(SITE, "red", "red"), "probe must be an Mlp, .* got str"),
        (lambda: ProbeGuidance(SITE, {SITE: [1]}, "red"), "probe must be an Mlp, .* got list"),
        (
            lambda: run(guided("red", ["blue", {"red"}, None])),
            "'red' is both to reach and to avoid",
        ),
        (
            lambda: run(guided(["red", None, "red"])),
            "row 1 has neither target nor avoid, though its alpha is not 0",
        ),
        (lambda: run(guided(["red", "red"])), "target of edit 0 .* has 2; each needs 1 or 3"),
        (
            lambda: run(ProbeGuidance(SITE, probe(7), "red")),
            f"at {SITE}: the probe reads 7 features, the site has {WIDTH}",
        ),
        (
            lambda: run(guided("red", pool="flat")),
            f"reads {WIDTH} features, the site has .* in its",
        ),
        (
            lambda: run(ProbeGuidance(SITE, lambda h: h.sum(), 0)),
            r"the probe must give logits \[6, ..., labels\] for .* got \[\]",
        ),
        (
            lambda: run(ProbeGuidance(SITE, probe().logits, "red")),
            "label 'red' is a name, the probe knows its 4 labels by index alone",
        ),
        (
            lambda: run(ProbeGuidance(SITE, probe().logits, 9)),
            "label 9 is out of range, the probe has 4",
        ),
    ],
)
def test_wrong_inputs_say_what_is_wrong(make: Any, text: str):
    with pytest.raises(InvalidInput, match=text):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: guided("rad"), "unknown label of a probe 'rad'; nearest: red. It has red, blue"),
        (lambda: guided("red", pool="max"), "unknown pool of ProbeGuidance 'max'"),
        (
            lambda: run(ProbeGuidance(SITE, {"unet.mid_block": probe()}, 0)),
            "unknown ProbeGuidance: probe for site",
        ),
    ],
)
def test_unknown_names_say_which_there_are(make: Any, text: str):
    with pytest.raises(UnknownName, match=text):
        make()


W, B = [torch.ones(5, 4), torch.ones(2, 5)], [torch.ones(5), torch.ones(2)]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Mlp(W, B[:1]), "1 to 3 layers, each with a bias; got 2 weights and 1 biases"),
        (lambda: Mlp([], []), "got 0 weights and 0 biases"),
        (lambda: Mlp(W[::-1], B[::-1]), r"layer 1 gets 2 features, its weight is \[5, 4\]"),
        (lambda: Mlp([W[0] / 0, W[1]], B), "weight of layer 0 has 20 of 20 values that are not"),
        (lambda: Mlp(W, B, labels=("a",)), "2 different labels are needed, .* got a"),
        (lambda: Mlp(W, B, labels=("a", "a")), "2 different labels are needed, .* got a, a"),
        (lambda: Mlp(W, B, noise=torch.ones(5, 2)), r"noise must be \[5, 3\], got \[5, 2\]"),
        (lambda: Mlp(W, B, noise=torch.ones(5, 3)).logits(torch.ones(1, 4)), "fraction is needed"),
    ],
)
def test_a_wrong_mlp_says_what_is_wrong(make: Any, text: str):
    with pytest.raises(InvalidInput, match=text):
        make()


def test_edits_at_one_site_follow_each_other():
    before, after = values(Scale(SITE, 2.0), guided("red"), Scale(SITE, 0.5))
    close(after, 0.5 * by_hand(2 * before, [-1, 0, 0, 0], 1.0))
