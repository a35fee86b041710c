"""Probes on rows whose labels are known."""

import pytest
import torch
from probes.made import SITE, activation, blobs, padded, shifting

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.probes import Probe, fit
from dreamreader.probes.fit import PARTS
from dreamreader.probes.rows import rows_of
from dreamreader.probes.split import HELD_OUT, TRAIN, VALIDATION, deal_groups, number_groups

QUICK = {"controls": False, "epochs": 40, "lr": 1e-2}


def accuracy(probe: Probe) -> float:
    return probe.card.held_out[""]["accuracy"]["value"]


@pytest.mark.parametrize("hidden", [(), (16,), (16, 8)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_separable_rows_are_told_apart(hidden: tuple[int, ...], activation: str):
    x, y = blobs()
    names = ["abc"[each] for each in y]
    probe = fit(x, names, hidden=hidden, activation=activation, **QUICK)
    assert accuracy(probe) > 0.9 and probe.labels == ("a", "b", "c") and probe.width == 8
    fresh, truth = blobs(seed=9)
    told = probe.predict(fresh)
    assert sum(a == "abc"[b] for a, b in zip(told, truth, strict=True)) > 0.9 * len(truth)
    sure = probe.probabilities(fresh)
    assert torch.allclose(sure.sum(-1), torch.ones(len(fresh)))


def test_jitter_turns_the_gradient_towards_the_means():
    """A clean probe takes a shared disturbance off by the second feature, where no mean differs."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 2
    shared = 3 * torch.randn(600, generator=draw)
    own = 0.2 * torch.randn(600, generator=draw)
    x = torch.stack([2.0 * y - 1 + shared + own, shared], 1)
    found = []
    for jitter in (0.0, 1.0):
        probe = fit(x, y, hidden=(), jitter=jitter, controls=False, epochs=60, lr=0.05)
        along = probe.mlps[0].weights[0][1] - probe.mlps[0].weights[0][0]
        found.append(float(along[0] / along.norm()))
    assert found[0] < 0.75 < 0.85 < found[1]
    with pytest.raises(InvalidInput, match="jitter must be 0 or more, got -1"):
        fit(x, y, jitter=-1, controls=False)


def test_noise_is_told_by_chance_and_controls_are_near_it():
    x, y = blobs(rows=300, apart=0.0)
    assert abs(accuracy(fit(x, y, hidden=(16,), **QUICK)) - 1 / 3) < 0.2
    x, y = blobs(rows=300)
    probe = fit(x, y, hidden=(16,), epochs=30, lr=1e-2)
    controls = probe.card.controls
    for name in ("shuffled_labels", "random_feature"):
        found = controls[name][""]
        assert abs(found["accuracy"]["value"] - 1 / 3) < 0.2 and abs(found["auroc"] - 0.5) < 0.2
    assert list(controls["capacity_sweep"]) == ["0", "16"]
    assert controls["capacity_sweep"]["0"][""]["auroc"] > 0.95
    assert controls["capacity_sweep"]["16"][""]["accuracy"] == probe.card.held_out[""]["accuracy"]


def test_the_best_validated_state_is_kept_and_never_the_untrained_one():
    from dreamreader.fitting import Best
    from dreamreader.probes.net import StackedMlps

    net = StackedMlps(2, (3, 2), "relu", False, 0)
    best = Best(net)
    better = []
    for epoch, losses in enumerate(([9.0, 1.0], [5.0, 2.0], [7.0, 3.0])):
        with torch.no_grad():
            net.weights[0].fill_(float(epoch + 1))
        better.append(best.offer(epoch, torch.tensor(losses)))
    best.restore()
    assert net.weights[0][:, 0, 0].tolist() == [2.0, 1.0] and best.at.tolist() == [1, 0]
    assert better == [True, True, False]
    x, y = blobs(apart=0.0)
    assert fit(x, y, controls=False, epochs=1, patience=1).card.epochs == [0]


def test_folding_the_standardisation_is_exact():
    from dreamreader.probes.net import StackedMlps

    g = torch.Generator().manual_seed(0)
    for hidden in ((), (5,), (5, 4)):
        net = StackedMlps(2, (6, *hidden, 3), "gelu", True, 1)
        with torch.no_grad():
            assert net.noise is not None
            net.noise.normal_(generator=g)
        x = 50 + 3 * torch.randn(2, 20, 6, generator=g)
        mean, scale = x.mean(1), x.std(1)
        middle, spread = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 0.5, 1.0])
        f = torch.rand(20, generator=g)
        whole = net((x - mean[:, None]) / scale[:, None], f) * spread + middle
        for n, mlp in enumerate(net.fold(mean, scale, ("a", "b", "c"), None, middle, spread)):
            assert torch.allclose(mlp.logits(x[n], f), whole[n], atol=1e-4)


def test_a_probe_reads_raw_rows_of_any_scale():
    x, y = blobs()
    plain = fit(x, y, hidden=(8,), **QUICK)
    moved = fit(1e-4 * x - 7e-3, y, hidden=(8,), **QUICK)
    assert torch.allclose(plain.logits(x), moved.logits(1e-4 * x - 7e-3), atol=1e-2)


@pytest.mark.parametrize("pool", ["mean", "token", "flat"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_rows_of_any_floating_point_type(dtype: torch.dtype, pool: str):
    x, y = blobs()
    probe = fit(x[:, None, None].to(dtype), y, hidden=(), per_step="shared", pool=pool, **QUICK)
    assert accuracy(probe) > 0.9
    same = fit(
        x.to(dtype).float()[:, None, None], y, hidden=(), per_step="shared", pool=pool, **QUICK
    )
    assert all(map(torch.equal, probe.mlps[0].weights, same.mlps[0].weights))


def test_neither_the_mode_nor_the_graph_around_it_matters():
    x, y = blobs()
    wanted = fit(x, y, hidden=(8,), **QUICK)
    with torch.inference_mode():
        assert fit(x.clone(), y, hidden=(8,), **QUICK) == wanted
    grown = (2 * x.clone().requires_grad_()) / 2
    assert fit(grown, y, hidden=(8,), **QUICK | {"controls": True}).mlps == wanted.mlps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("task", ["classify", "regress"])
@pytest.mark.parametrize("per_step", ["each", "noise"])
def test_rows_on_a_gpu_train_the_same_probe(task: str, per_step: str):
    x, y = shifting()
    labels = y.tolist() if task == "classify" else y.float()
    options = {**QUICK, "task": task, "per_step": per_step, "controls": True, "epochs": 5}
    here, there = (fit(each, labels, hidden=(8,), **options) for each in (x, x.cuda()))
    assert torch.allclose(here.logits(x), there.logits(x), rtol=1e-2, atol=1e-2)


def test_each_step_has_a_probe_of_its_own():
    x, y = shifting()
    x[:, ::2, 0] *= -1  # the sign of the boundary changes from step to step
    probe = fit(x, y, hidden=(), **QUICK)
    assert probe.steps == tuple(range(6)) and min(probe.card.held_out[""]["by_step"]) > 0.9
    assert len(probe.mlps) == 6 and probe.at(3).steps == (3,)
    with pytest.raises(InvalidInput, match=r"has none for step 6; trained at 0, 1, 2, 3, 4, 5"):
        probe.logits(x[:, 0], step=6)
    with pytest.raises(InvalidInput, match="an MLP for each step; give step="):
        probe.logits(x[:, 0])


def test_a_probe_that_hears_the_noise_beats_a_shared_one():
    x, y = shifting()
    more = QUICK | {"epochs": 100}
    shared, noise = (fit(x, y, hidden=(), per_step=how, **more) for how in ("shared", "noise"))
    assert accuracy(noise) > 0.95 > accuracy(shared) + 0.2
    assert noise.noise_conditioned and not shared.noise_conditioned
    told = noise.predict(x[:, 4], fraction=4 / 6)
    assert sum(int(a) == b for a, b in zip(told, y.tolist(), strict=True)) > 190
    with pytest.raises(InvalidInput, match="conditioned on the noise level; give fraction="):
        noise.logits(x[:, 4])


def test_several_attributes_are_told_by_one_probe():
    x, y = blobs(classes=4)
    labels = {"color": ["rgby"[each] for each in y], "odd": [bool(each % 2) for each in y]}
    probe = fit(x, labels, classes={"color": "rgby", "odd": ("no", "yes")}, **QUICK)
    assert probe.labels == ("color=r", "color=g", "color=b", "color=y", "odd=no", "odd=yes")
    told = probe.predict(x)
    assert told["color"][:4] == list("rgby") and told["odd"][:4] == ["no", "yes", "no", "yes"]
    sure = probe.probabilities(x)
    assert torch.allclose(sure[:, :4].sum(-1), torch.ones(len(x)))
    assert torch.allclose(sure[:, 4:].sum(-1), torch.ones(len(x)))
    assert set(probe.card.held_out) == {"color", "odd"}
    assert "| odd | probe |" in probe.card.markdown()


def test_sets_of_labels_and_numbers():
    x, y = blobs()
    sets = [{"first"} if each == 0 else {"second", "other"} if each == 1 else () for each in y]
    probe = fit(x, sets, task="multilabel", **QUICK)
    assert probe.predict(x[:3]) == [{"first"}, {"other", "second"}, set()]
    assert probe.card.held_out[""]["accuracy"]["value"] > 0.9
    size = 100 + x[:, 0] - 2 * x[:, 5]
    probe = fit(x, {"size": size}, task="regress", hidden=(), **QUICK | {"epochs": 200})
    assert probe.card.held_out[""]["r2"]["size"] > 0.99
    assert torch.allclose(probe.predict(x)[:, 0], size, atol=3.0)
    with pytest.raises(InvalidInput, match="a regression has no probabilities"):
        probe.probabilities(x)
    assert "| size | probe |" in probe.card.markdown()


def test_sigmoid_loss_and_class_weights():
    x, y = blobs(rows=200, classes=2, apart=1.0)
    rare = torch.where(torch.arange(200) % 10 < 8, 0, y)  # one row of ten has class 1
    plain, fair = (
        fit(x, rare, hidden=(), class_weights=weights, loss="sigmoid", **QUICK)
        for weights in (None, "balanced")
    )
    counts = list(fair.card.counts.values())
    assert fair.card.class_weights["1"] == pytest.approx(sum(counts) / (2 * counts[1]))
    assert fair.probabilities(x)[:, 1].mean() > plain.probabilities(x)[:, 1].mean() + 0.1
    given = fit(x, rare, class_weights={"1": 3.0}, **QUICK)
    assert given.card.class_weights == {"0": 1.0, "1": 3.0}
    with pytest.raises(UnknownName, match="label in class_weights '2'"):
        fit(x, rare, class_weights={"2": 3.0}, **QUICK)


@pytest.mark.parametrize("pool, width", [("mean", 4), ("token", 4), ("flat", 12)])
def test_pools(pool: str, width: int):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(100) % 2
    x = torch.randn(100, 2, 3, 4, generator=g) + 3.0 * y[:, None, None, None]
    found = activation(x)
    probe = fit(found, y, pool=pool, hidden=(), subject="tiny", **QUICK)
    assert probe.width == width and probe.site == SITE and probe.branch == "cond"
    assert probe.card.rows["train"] == 60 and accuracy(probe) > 0.9
    shape = (100, 2, 3, 2) if pool == "token" else (100, 2, 2)
    assert probe.logits(found).shape == shape == probe.probabilities(found).shape
    rows = x[:, 1] if pool == "token" else x[:, 1].mean(1) if pool == "mean" else x[:, 1].flatten(1)
    assert torch.allclose(probe.logits(found)[:, 1], probe.logits(rows, step=1), atol=1e-5)
    heat = probe.temperature_at(1)
    own = (probe.logits(rows, step=1) / heat).softmax(-1)
    assert torch.allclose(probe.probabilities(found)[:, 1], own, atol=1e-5)


def test_the_first_evaluation_of_a_step_stands_for_it():
    from dataclasses import replace

    found = activation(torch.arange(12.0).reshape(2, 3, 1, 2))
    first, second, third = found.steps
    again = replace(first, evaluation=1)
    rows = rows_of(replace(found, steps=(first, again, third)), "mean")
    assert rows.steps == (0, 2) and rows.fractions == (0.0, 2 / 3)
    assert torch.equal(rows.values, found.tensor[:, [0, 2]]) and second.step == 1


def test_groups_are_never_split():
    group = number_groups([n // 5 for n in range(100)], 100)
    targets = (group % 4).unsqueeze(1)
    part = deal_groups(group, targets, 5, 0)
    for each in range(20):
        assert len(part[group == each].unique()) == 1
    sizes = [int((part == each).sum()) for each in (TRAIN, VALIDATION, HELD_OUT)]
    assert sizes == [60, 20, 20]
    assert part.equal(deal_groups(group, targets, 5, 0)) and not part.equal(
        deal_groups(group, targets, 5, 1)
    )
    for each in PARTS.values():  # every class has its share
        assert len(targets[part == each].unique()) == 4


def test_rows_of_one_prompt_belong_together():
    """Rows that tell their prompt, whose labels are drawn: only a split by row could be right."""
    g = torch.Generator().manual_seed(0)
    prompts = [f"prompt {n // 6}" for n in range(240)]
    centre = 20 * torch.randn(40, 8, generator=g)
    x = centre.repeat_interleave(6, 0) + torch.randn(240, 8, generator=g)
    y = torch.randint(2, (40,), generator=g).repeat_interleave(6)
    found = activation(x[:, None, None], prompts)
    probe = fit(found, y, hidden=(64,), **QUICK)
    assert probe.card.groups == {"train": 24, "validation": 8, "held_out": 8}
    assert accuracy(probe) < 0.85
    leaking = fit(found, y, hidden=(64,), groups=range(240), **QUICK)
    assert accuracy(leaking) > 0.95
    interval = probe.card.held_out[""]["accuracy"]
    assert interval["n"] == 8 and interval["high"] - interval["low"] > 0.3


def test_what_cannot_be_right_says_so():
    x, y = blobs(rows=30)
    for labels, message in (
        (y[:20], "labels: 20 for 30 rows"),
        (torch.zeros(30, dtype=torch.long), r"a classifier needs two different classes .* \['0'\]"),
        (["a"] * 30, r"a classifier needs two different classes or more, got \['a'\]"),
        (-y, "-1 is out of range, there are"),
        (torch.rand(30), "names or numbers of classes are needed, got float"),
        ({"a": y, "b": y[:2]}, r"different numbers of rows \(a 30, b 2\)"),
    ):
        with pytest.raises(InvalidInput, match=message):
            fit(x, labels, **QUICK)
    with pytest.raises(InvalidInput, match="2 is out of range, there are 2 classes"):
        fit(x, y, classes=("a", "b"), **QUICK)
    with pytest.raises(InvalidInput, match="all 18 rows to train on are 'a'"):
        fit(x, ["a"] * 30, classes=("a", "b"), **QUICK)
    with pytest.raises(InvalidInput, match="no row to train on is 'd'; give more rows"):
        fit(x, y, classes=("a", "b", "c", "d"), **QUICK)
    with pytest.raises(UnknownName, match="unknown class 'z'"):
        fit(x, ["z"] * 30, classes=("a", "b"), **QUICK)
    with pytest.raises(InvalidInput, match="2 of 30 rows have values that are not finite.* row 3"):
        fit(x.index_fill(0, torch.tensor([3, 8]), torch.nan), y, **QUICK)
    with pytest.raises(InvalidInput, match="lr must be positive, got nan"):
        fit(x, y, **QUICK | {"lr": float("nan")})
    with pytest.raises(InvalidInput, match="holdout=40: no row is held out of 30 groups"):
        fit(x, y, holdout=40, **QUICK)
    with pytest.raises(InvalidInput, match="holdout=0: no row is held out"):
        fit(x, y, holdout=0, **QUICK)
    with pytest.raises(InvalidInput, match="2 groups of rows cannot be split"):
        fit(x, y, groups=[0, 1] * 15, **QUICK)
    with pytest.raises(InvalidInput, match="groups: 3 for 30 rows"):
        fit(x, y, groups=[0, 1, 2], **QUICK)
    with pytest.raises(InvalidInput, match=r"the recording has 2 \(a, b\)"):
        fit({"a": x, "b": x}, y, **QUICK)
    with pytest.raises(InvalidInput, match=r"branches uncond, cond; choose one"):
        fit(
            activation(x[:, None, None, None].repeat(1, 2, 1, 1, 1), branches=("uncond", "cond")), y
        )
    with pytest.raises(InvalidInput, match=r"none to two widths from 1, got \(3, 3, 3\)"):
        fit(x, y, hidden=(3, 3, 3))
    with pytest.raises(InvalidInput, match="the loss of the probe is not finite"):
        fit(x, y, hidden=(8,), lr=1e30)
    for wrong in ({"pool": "max"}, {"loss": "hinge"}, {"per_step": "all"}, {"task": "rank"}):
        with pytest.raises(UnknownName, match=next(iter(wrong.values()))):
            fit(x, y, **wrong)


def test_a_probe_on_another_width_or_site_says_so():
    x, y = blobs()
    probe = fit(activation(x[:, None, None]), y, **QUICK)
    with pytest.raises(InvalidInput, match=rf"{SITE}: it reads 8 features, x is \[150, 7\]"):
        probe.logits(x[:, :7], step=0)
    with pytest.raises(InvalidInput, match=f"{SITE}: the rows are of unet.conv_out"):
        probe.logits({"unet.conv_out": x})
    plain = fit(x, y, **QUICK)
    with pytest.raises(InvalidInput, match="rows without a site; give site="):
        plain.guidance("0")


def test_a_probe_writes_the_edit_that_it_guides():
    import dreamreader as dr

    x, y = blobs()
    probe = fit(activation(x[:, None, None]), y, classes=("a", "b", "c"), **QUICK)
    edit = probe.guidance(target="a", avoid={"b", "c"}, alpha=[1.0, 2.0], iterations=3)
    same = dr.ProbeGuidance(
        SITE, probe.mlps, "a", {"b", "c"}, [1.0, 2.0], iterations=3, pool="mean", branch="cond"
    )
    assert edit == same
    with pytest.raises(UnknownName, match="'d'"):
        probe.guidance(target="d")


def test_padding_is_no_row_and_no_part_of_a_mean():
    """Rows of 2 to 4 tokens, with what is not finite before them."""
    found, each = padded(60)
    y = torch.arange(60) % 3
    mean = fit(found, y, hidden=(), **QUICK)
    own = torch.stack([row.mean(0) for row in each])
    wanted = fit(own, y, hidden=(), **QUICK).mlps[0]
    torch.testing.assert_close(mean.mlps[0].weights, wanted.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean.logits(found)[:, 0], mean.logits(own))
    assert mean.predict(found) == [[label] for label in mean.predict(own)]
    # every token with its row's label; rows are the groups
    tokens = fit(found, y, hidden=(), pool="token", **QUICK)
    lengths = [len(row) for row in each]
    group = torch.arange(60).repeat_interleave(torch.tensor(lengths))
    part = deal_groups(torch.arange(60), y[:, None], 5, 0)
    plain = rows_of(found, "token")
    assert int(plain.real.sum()) == sum(lengths) and bool(plain.values.isfinite().all())
    made = _problem_rows(found, y)
    assert torch.equal(made.x[0], torch.cat(each)) and torch.equal(made.group, group)
    assert torch.equal(made.targets[:, 0], y[group]) and torch.equal(made.part, part[group])
    logits = tokens.logits(found)[:, 0]
    told = tokens.predict(found)
    for row, values in enumerate(each):
        torch.testing.assert_close(logits[row, 4 - len(values) :], tokens.logits(values))
        assert bool(logits[row, : 4 - len(values)].isnan().all())
        assert told[row][0] == [None] * (4 - len(values)) + tokens.predict(values)
    with pytest.raises(InvalidInput, match="the rows have 2 to 4 tokens, and pool 'flat' reads as"):
        fit(found, y, pool="flat", **QUICK)
    many = fit(found, [{"a"} if n % 2 else {"b"} for n in y], task="multilabel", pool="token",
               **QUICK)  # fmt: skip
    assert many.predict(found)[0][0][:2] == [None, None]


def _problem_rows(found, y):
    from dreamreader.probes.fit import _problem
    from dreamreader.probes.labels import encode_labels
    from dreamreader.probes.objective import count_rows, objective
    from dreamreader.probes.train import Design, recipe_of

    told, targets = encode_labels(y, "classify", None, len(y))
    group = torch.arange(len(y))
    part = deal_groups(group, targets, 5, 0)
    goal = objective(told, "softmax", None, count_rows(told, targets))
    how = Design((), "relu"), recipe_of(1, 1, 1e-3, 64, 0)
    return _problem(rows_of(found, "token"), targets, part, group, "shared", goal, *how)
