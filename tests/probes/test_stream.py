"""Probes trained on batches that are read several times over."""

from collections.abc import Callable, Iterator

import pytest
import torch
from probes.made import blobs, shifting

from dreamreader.errors import InvalidInput
from dreamreader.probes import Probe, fit_batches
from dreamreader.probes.source import LabelledSource, survey_rows

NAMES = ("a", "b", "c")
QUICK = {"classes": NAMES, "hidden": (8,), "controls": False, "lr": 1e-2, "epochs": 8}


def batches(seed: int, count: int = 4, apart: float = 6.0) -> list[tuple]:
    x, y = blobs(rows=60 * count, apart=apart, seed=seed)
    return list(zip(x.split(60), y.split(60), strict=True))


def accuracy(probe: Probe) -> float:
    return probe.card.held_out[""]["accuracy"]["value"]


def test_batches_train_a_probe():
    probe = fit_batches(batches(0, 10), batches(1), batches(2), site="a.b", **QUICK)
    assert accuracy(probe) > 0.9 and probe.site == "a.b" and probe.pool == "token"
    assert probe.card.rows == {"train": 600, "validation": 240, "held_out": 240}
    x, y = blobs(seed=5)
    assert sum(NAMES[b] == a for a, b in zip(probe.predict(x), y, strict=True)) > 130


def test_it_trains_in_inference_mode_too():
    wanted = fit_batches(batches(0), batches(1), batches(2), **QUICK)
    with torch.inference_mode():
        assert fit_batches(batches(0), batches(1), batches(2), **QUICK) == wanted


def test_controls_depend_on_the_seed_that_is_given_alone(reseeded: Callable):
    parts = [batches(n, 2, apart=1.0) for n in range(3)]
    one, again = reseeded(
        lambda: fit_batches(*parts, **QUICK | {"controls": True, "epochs": 1, "hidden": ()})
    )
    assert one.card.controls == again.card.controls


def test_names_attributes_and_half_precision():
    named = [
        [(x.to(torch.float16), {"kind": [NAMES[n] for n in y], "odd": y % 2}) for x, y in part]
        for part in (batches(0, 10), batches(1), batches(2))
    ]
    classes = {"kind": NAMES, "odd": ("no", "yes")}
    probe = fit_batches(*named, **QUICK | {"classes": classes})
    assert probe.labels == ("kind=a", "kind=b", "kind=c", "odd=no", "odd=yes")
    assert probe.card.held_out["kind"]["accuracy"]["value"] > 0.9


def test_one_pass_tells_mean_and_deviation():
    parts = [(x + 1e4, y) for x, y in batches(0, 5)]
    found = survey_rows(LabelledSource(parts, "batches", "classify", NAMES, "shared"))
    whole = torch.cat([x for x, _ in parts]).double()
    assert torch.allclose(found.mean[0], whole.mean(0).float(), rtol=1e-6)
    assert torch.allclose(found.scale[0], whole.std(0, correction=0).float(), rtol=1e-3)
    assert found.counts.tolist() == [100, 100, 100, 300]


def test_a_function_gives_the_batches_of_an_epoch():
    asked = []

    def some(epoch: int) -> Iterator[tuple]:
        asked.append(epoch)
        order = torch.randperm(4, generator=torch.Generator().manual_seed(epoch))
        return (batches(0)[n] for n in order)

    fit_batches(some, batches(1), batches(2), **QUICK | {"epochs": 3, "patience": 3})
    assert asked == [0, 0, 1, 2]  # the survey, then three epochs


def stepped(seed: int, rows: int = 300) -> list[tuple]:
    """Rows with their fraction and step, in an order that mixes steps."""
    x, y = shifting(rows, 3, seed)
    order = torch.randperm(rows * 3, generator=torch.Generator().manual_seed(seed))
    step = torch.arange(3).repeat(rows)[order]
    x, y = x.flatten(0, 1)[order], y.repeat_interleave(3)[order]
    return list(zip(x.split(90), y.split(90), (step / 3).split(90), step.split(90), strict=True))


def test_steps_and_noise():
    more = QUICK | {"classes": ("low", "high"), "hidden": (), "lr": 3e-2}
    parts = stepped(0), stepped(1, 100), stepped(2, 100)
    found = {how: fit_batches(*parts, per_step=how, **more) for how in ("shared", "noise", "each")}
    assert accuracy(found["noise"]) > 0.95 and accuracy(found["each"]) > 0.95
    assert accuracy(found["shared"]) < 0.9 and found["noise"].noise_conditioned
    each = found["each"]
    assert sorted(each.steps) == [0, 1, 2] and each.at(2).steps == (2,)
    x, y = shifting(50, 3, 7)
    told = each.predict(x[:, 2], step=2)
    assert sum(("low", "high")[b] == a for a, b in zip(told, y, strict=True)) > 45
    with pytest.raises(InvalidInput, match="needs the step of rows"):
        fit_batches(batches(0), batches(1), batches(2), per_step="each", **QUICK)
    with pytest.raises(InvalidInput, match="held_out: there are no rows of step"):
        few = [(x[s == 0], y[s == 0], f[s == 0], s[s == 0]) for x, y, f, s in stepped(3, 60)]
        fit_batches(parts[0], parts[1], few, per_step="each", **more | {"epochs": 1})


def test_controls_are_near_chance():
    probe = fit_batches(
        batches(0, 10), batches(1), batches(2), **QUICK | {"controls": True, "epochs": 3}
    )
    controls = probe.card.controls
    for name in ("shuffled_labels", "random_feature"):
        assert abs(controls[name][""]["auroc"] - 0.5) < 0.15
    assert list(controls["capacity_sweep"]) == ["0", "8"]


def test_numbers():
    parts = [[(x, x[:, 0] - x[:, 1] + 500) for x, _ in batches(n)] for n in range(3)]
    probe = fit_batches(
        *parts, task="regress", hidden=(), controls=False, lr=3e-2, epochs=40, patience=40
    )
    assert probe.card.held_out[""]["r2"]["value"] > 0.99


def test_what_cannot_be_right_says_so():
    rest = batches(1), batches(2)
    with pytest.raises(InvalidInput, match="batches: these batches can be read only once"):
        fit_batches(iter(batches(0)), *rest, **QUICK)
    with pytest.raises(InvalidInput, match="give classes="):
        fit_batches(batches(0), *rest, **QUICK | {"classes": None})
    with pytest.raises(InvalidInput, match="batches: there are no rows"):
        fit_batches([], *rest, **QUICK)
    with pytest.raises(InvalidInput, match="held_out: there are no rows"):
        fit_batches(batches(0), batches(1), [], **QUICK | {"epochs": 1})
    with pytest.raises(InvalidInput, match="batches: values are not finite"):
        fit_batches([(x / 0, y) for x, y in batches(0)], *rest, **QUICK)
    with pytest.raises(InvalidInput, match=r"a batch is \(x, labels\).* got Tensor"):
        fit_batches([x for x, _ in batches(0)], *rest, **QUICK)
    with pytest.raises(InvalidInput, match=r"x must be floating point .* got \[60, 1, 8\]"):
        fit_batches([(x[:, None], y) for x, y in batches(0)], *rest, **QUICK)
    with pytest.raises(InvalidInput, match="rows have 7 features, before 8"):
        fit_batches([*batches(0), (batches(0)[0][0][:, :7], batches(0)[0][1])], *rest, **QUICK)
    with pytest.raises(InvalidInput, match="all 240 rows to train on are 'a'"):
        fit_batches([(x, 0 * y) for x, y in batches(0)], *rest, **QUICK)
