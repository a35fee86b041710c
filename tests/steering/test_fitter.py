"""What is fitted and what is kept out, pairs and groups, steps, evidence, and wrong inputs."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import tiny
import torch
from steering.recorded import SITE, activation, cosine, gaussian

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.steering import Fitter, fit, fit_pairs
from dreamreader.steering.evidence import auc
from dreamreader.steering.split import HELD_OUT, RowSplit


def test_batches_and_kinds_of_labels_do_not_show():
    x, labels, _, _ = gaussian(90, 5)
    numbers = torch.tensor([["red", "blue"].index(label) for label in labels])
    whole = fit({"s": x}, labels, "red", "blue", "lda")
    parts, numbered, alone = (Fitter(labels, keep="rows") for labels in ((), ("red", "blue"), ()))
    for i in (slice(0, 1), slice(1, 50), slice(50, 90)):
        parts.add({"s": x[i]}, labels[i])
        numbered.add({"s": x[i]}, numbers[i])
    alone.add({"s": x[numbers == 0]}, "red")
    alone.add({"s": x[numbers == 1]}, "blue")
    for fitter in (parts, numbered, alone):
        found = fitter.fit("red", "blue", "lda")
        torch.testing.assert_close(found["s"], whole["s"])
        assert found.evidence["s"].auc == pytest.approx(whole.evidence["s"].auc)
        assert found.evidence["s"].split_half == pytest.approx(whole.evidence["s"].split_half)


def test_rows_kept_out_have_no_part_in_the_fit():
    x, labels, _, _ = gaussian(80, 4)
    places = torch.from_numpy(RowSplit(4, 1024, 0).of(np.arange(40)).repeat(2))
    out = places == HELD_OUT
    assert int(out.sum()) == 20
    broken = torch.where(out[:, None], x * -1e6, x)  # whatever they are
    for method in ("mean", "pca", "lda", "logistic"):
        found, other = (fit({"s": each}, labels, "red", "blue", method) for each in (x, broken))
        assert torch.equal(found["s"], other["s"])
        assert found.evidence["s"].auc != other.evidence["s"].auc
    fitter = Fitter()
    fitter.add({"s": x}, labels)
    kept = x[~out & torch.tensor([label == "red" for label in labels])]
    torch.testing.assert_close(fitter.mean("s", "red")[0], kept.mean(0))
    torch.testing.assert_close(fitter.variance("s", "red")[0], kept.var(0, correction=0))


def test_the_split_keeps_one_of_every_block_and_deals_equal_halves():
    for holdout in (2, 3, 4, 10):
        split = RowSplit(holdout, 50, seed=1)
        places = torch.from_numpy(split.of(np.arange(20_000)))
        out = (places[: 50 * holdout] == HELD_OUT).view(50, holdout).sum(1)
        assert out.tolist() == [1] * 50
        assert bool((places[50 * holdout :] != HELD_OUT).all())  # no more than `kept`
        halves = [int((places == half).sum()) for half in (0, 1)]
        assert abs(halves[0] - halves[1]) <= 2 + 64
        early = places[places != HELD_OUT][:100].tolist()
        assert abs(early.count(0) - early.count(1)) <= 1
        parts = [split.of(part) for part in np.split(np.arange(20_000), [5, 7000])]
        assert np.array_equal(np.concatenate(parts), places)
        assert bool((places[: holdout - 1] != HELD_OUT).all())  # a few rows are all fitted
    assert bool((places.numpy() != RowSplit(10, 50, seed=2).of(np.arange(20_000))).any())
    assert bool((RowSplit(0, 50, 0).of(np.arange(100)) != HELD_OUT).all())


def test_pairs_stay_together():
    base = torch.randn(40, 6) * 100  # far larger than the change: only pairs can show it
    change = torch.randn(6)
    found = fit_pairs({"s": base}, {"s": base + change})
    torch.testing.assert_close(found["s"], change, rtol=1e-4, atol=1e-4)
    assert found.evidence["s"].rows == (30, 30) and found.evidence["s"].held_out == (10, 10)
    assert found.evidence["s"].split_half == pytest.approx((1.0,), abs=1e-4)
    assert (found.source, found.target) == ("source", "target")


def test_groups_stay_together():
    groups = [number // 3 for number in range(60)]  # three rows of each, any label
    x = torch.tensor(groups, dtype=torch.float32)[:, None]
    fitter = Fitter(keep="rows", holdout=2)
    fitter.add({"s": x[:31]}, ["red", "blue"] * 15 + ["red"], groups[:31])
    fitter.add({"s": x[31:]}, ["blue", "red"] * 14 + ["blue"], groups[31:])
    at = fitter._sites["s"]
    fitted = set(at.statistics.rows(range(4), 0).flatten().tolist())
    held = set(torch.cat([at.held_rows(0), at.held_rows(1)]).flatten().tolist())
    assert len(fitted) == len(held) == 10 and not fitted & held


def test_each_step_and_shared():
    x = torch.randn(24, 3, 4, 5)
    labels = ["red", "blue"] * 12
    each = fit({"s": x}, labels, "red", "blue", holdout=0)["s"]
    shared = fit({"s": x}, labels, "red", "blue", holdout=0, steps="shared")["s"]
    means = x.double().mean(2)
    torch.testing.assert_close(each, (means[1::2].mean(0) - means[::2].mean(0)).float())
    torch.testing.assert_close(shared, each.mean(0))
    for step in range(3):
        alone = fit({"s": means[:, step]}, labels, "red", "blue", "lda")["s"]
        torch.testing.assert_close(fit({"s": x}, labels, "red", "blue", "lda")["s"][step], alone)


def test_recorded_steps_keep_their_place_and_evaluations_of_a_step_are_averaged():
    x = torch.randn(16, 4, 3, 5)
    labels = ["red", "blue"] * 8
    found = fit(activation(x, steps=(2, 2, 5, 5)), labels, "red", "blue", holdout=0)
    table = found[SITE]
    assert table.shape == (6, 5) and found.evidence[SITE].steps == (2, 5)
    expected = x[1::2].double().mean((0, 2)) - x[::2].double().mean((0, 2))
    torch.testing.assert_close(table[2], expected[:2].mean(0).float())
    torch.testing.assert_close(table[5], expected[2:].mean(0).float())
    assert torch.equal(table[[0, 1, 3, 4]], torch.zeros(4, 5))


def test_a_recording_outside_of_the_steps_gives_one_vector():
    from dataclasses import replace

    from dreamreader.engine._clock_schedule import StepInfo

    untimed = (StepInfo(0, math.nan, None, math.nan, 0),)
    found = replace(activation(torch.randn(8, 1, 3, 5)), steps=untimed)
    assert fit(found, ["red", "blue"] * 4, "red", "blue")[SITE].shape == (5,)
    heads = activation(torch.randn(8, 2, 3, 4, 5))
    assert fit(heads, ["red", "blue"] * 4, "red", "blue")[SITE].shape == (2, 20)


def test_evidence_tells_a_direction_from_none():
    x, labels, _, _ = gaussian(400, 10)
    good = fit({"s": x}, labels, "red", "blue", "lda").evidence["s"]
    assert good.rows == (150, 150) and good.held_out == (50, 50)
    assert good.auc[0] > 0.93 and good.split_half[0] > 0.8
    shuffled = [labels[i] for i in torch.randperm(400).tolist()]
    none = fit({"s": x}, shuffled, "red", "blue", "lda").evidence["s"]
    assert 0.3 < none.auc[0] < 0.7
    assert none.split_half[0] < 0.6 < good.split_half[0]


def test_shuffled_labels_separate_nothing_on_average():
    aucs, real = [], []
    for seed in range(30):
        x, labels, _, _ = gaussian(120, 10, seed=seed)
        found = fit({"s": x}, labels, "red", "blue", seed=seed).evidence["s"]
        aucs.append(found.auc_shuffled[0])
        real.append(found.auc[0])
    assert abs(sum(aucs) / 30 - 0.5) < 0.12
    assert sum(real) / 30 > sum(aucs) / 30 + 0.2


def test_too_few_rows_for_a_number_give_nan():
    found = fit({"s": torch.randn(2, 3)}, ["red", "blue"], "red", "blue").evidence["s"]
    assert found.held_out == (0, 0)
    assert all(math.isnan(getattr(found, name)[0]) for name in ("auc", "split_half", "auc_random"))


def test_auc_counts_pairs():
    a, b = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 2.0])
    pairs = [(x < y) + 0.5 * (x == y) for x in a.tolist() for y in b.tolist()]
    assert auc(a, b) == pytest.approx(sum(pairs) / 6)
    assert auc(b, b) == 0.5 and auc(a, a + 5) == 1.0 and auc(a + 5, a) == 0.0
    assert math.isnan(auc(a, b[:0])) and math.isnan(auc(a, b * torch.nan))


def test_several_labels_give_directions_between_any_two():
    x = torch.randn(60, 4)
    labels = ["red", "blue", "green"] * 20
    fitter = Fitter(holdout=0)
    fitter.add({"s": x}, labels)
    assert fitter.labels == ["red", "blue", "green"] and fitter.sites == ["s"]
    ab, bc, ac = (
        fitter.fit(*pair)["s"] for pair in (("red", "blue"), ("blue", "green"), ("red", "green"))
    )
    torch.testing.assert_close(ab + bc, ac)
    assert cosine(fitter.fit("blue", "red")["s"], ab) == pytest.approx(-1)


X = torch.zeros(4, 2, 1, 3)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda f: f.add({SITE: X}, ["a"] * 3), "3 labels for 4 rows"),
        (lambda f: f.add({SITE: X}, ["a"] * 4, groups=[1]), "1 groups for 4 rows"),
        (lambda f: f.add({SITE: X[:, :1]}, "a"), r"steps are 0 .. 0 \(1\), before 0 .. 1 \(2\)"),
        (lambda f: f.add({SITE: X.expand(4, 2, 5, 3)}, "a"), "5 tokens were recorded, before 1"),
        (lambda f: f.add({SITE: X[..., :2]}, "a"), r"is \[2, 2\], before \[2, 3\]"),
        (lambda f: f.add({SITE: X / 0}, "a"), f"{SITE}: values are not finite"),
        (
            lambda f: f.add({SITE: X.long()}, "a"),
            "floating point values are needed, got torch.int64",
        ),
        (lambda f: f.add({SITE: X[0, 0, 0]}, "a"), r"is needed, got \[3\]"),
        (lambda f: f.add({SITE: X[..., :0]}, "a"), "holds no values"),
        (lambda f: f.add({}, "a"), "the recording has no sites"),
        (lambda f: f.add(X, "a"), "mapping from site to tensor, got Tensor"),
        (
            lambda f: f.add(activation(torch.ones(1, 2, 2, 1, 3), ("uncond", "cond")), "a"),
            "recorded for the branches uncond, cond; choose one",
        ),
        (
            lambda f: f.add({SITE: X}, torch.tensor([0, 1, 2, 3])),
            r"label numbers run over 0 .. 3, 1 labels are named",
        ),
        (lambda f: f.add({SITE: X}, torch.zeros(3)), r"must be int64 \[4\], got float32 \[3\]"),
        (lambda f: f.add_pairs({SITE: X}, {"t": X}), f"only one has t, {SITE}"),
        (
            lambda f: f.add_pairs({SITE: X}, {SITE: X[:3]}),
            "4 source rows and 3 target rows; pairs need as many of both",
        ),
        (
            lambda f: f.add_pairs({SITE: X}, {SITE: X[:, :1]}),
            r"source has steps 0 .. 1 \(2\) and 3 features, the target 0 .. 0 \(1\) and 3",
        ),
        (lambda f: f.fit("a", "a"), "source and target are both 'a'"),
        (lambda f: Fitter().fit(), "no rows were added, there is nothing to fit"),
        (lambda f: Fitter(["a", "a"]), "labels must be different names"),
        (lambda f: Fitter(holdout=1), "holdout: 0 or 2 and more are possible, got 1"),
        (lambda f: Fitter(kept=-1), "kept must not be negative"),
    ],
)
def test_wrong_inputs_say_what_is_wrong_and_change_nothing(call, text):
    fitter = Fitter()
    fitter.add({SITE: torch.ones(2, 2, 1, 3)}, "a")
    with pytest.raises(InvalidInput, match=text):
        call(fitter)
    assert torch.equal(fitter.mean(SITE, "a"), torch.ones(2, 3, dtype=torch.float64))
    assert fitter._sites[SITE].seen == {0: 2}


def test_one_label_alone_has_no_direction():
    fitter = Fitter()
    fitter.add({SITE: X}, "a")
    with pytest.raises(UnknownName, match="unknown label 'b'; nearest: a"):
        fitter.fit("a", "b")
    fitter.add({"other": X}, "b")
    with pytest.raises(InvalidInput, match=f"{SITE}: label 'b' has no rows in the fit, 0 kept out"):
        fitter.fit("a", "b")
    with pytest.raises(UnknownName, match="unknown choice of steps 'all'"):
        Fitter(steps="all")
    with pytest.raises(UnknownName, match="unknown site 'x'"):
        fitter.mean("x", "a")


def test_prompts_of_unequal_length_give_the_direction_of_each_alone():
    reader = Reader(*tiny.language_model("gpt2"))
    prompts = ["a cat", "a red dog on a tree", "the blue cat", "a dog", "a red house", "the tree"]
    labels, site = ["x", "y"] * 3, "transformer.h.1"
    together, apart = Fitter(), Fitter()
    cache = reader.run(prompts, record=site).cache
    assert cache[site].padding is not None
    together.add(cache, labels)
    for prompt, label in zip(prompts, labels, strict=True):
        apart.add(reader.run(prompt, record=site).cache, [label])
    found, wanted = (each.fit("x", "y", norm="channel").vectors[site] for each in (together, apart))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(InvalidInput, match="row 0 has nothing but padding"):
        Fitter().add(cache.select(tokens=[0]), labels)


@pytest.mark.parametrize("method", ["pca", "logistic", "lda"])
def test_float64_rows_far_from_zero_are_kept_as_they_are(method):
    noise = torch.randn(200, 5, dtype=torch.float64)
    noise[1::2, 2] += 4
    found = []
    for rows in (noise, 1e6 + 1e-3 * noise):
        fitter = Fitter(keep="rows")
        fitter.add({"0": rows}, ["a", "b"] * 100)
        found.append(fitter.fit("a", "b", method)["0"])
    near, far = (each / each.norm() for each in found)
    torch.testing.assert_close(far, near, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [range(4096), range(4096, 70_000)], ids=["first", "later"])
def test_the_split_follows_its_own_seed(rows: range, reseeded: Callable):
    one, again = reseeded(lambda: RowSplit(10, 50, seed=1).of(np.array(rows)))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, RowSplit(10, 50, seed=2).of(np.array(rows)))
