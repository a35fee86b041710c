"""Ablation in experiments gives the grid of `dreamreader.localise`."""

import numpy as np
import pytest

from dreamreader.edits import Ablate, Patch
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.experiments import Experiment
from dreamreader.experiments.pages.chunked import effects
from dreamreader.localise import Cell, Grid, ablate_grid, grid

from ..conftest import PAIRS
from .test_patch import SEEDS, SITES, STEPS, Blueness, blueness

PROMPTS = [pair["source"] for pair in PAIRS]


def resampled(reader: Reader, prompts: list[str], seeds: list[int], cells: list[Cell]) -> Grid:
    """Every row with the values of the other prompt, of the same seed."""
    whole = reader.run(prompts, record=SITES, seeds=seeds, **STEPS)
    values = []
    for cell in cells:
        edit = Patch(cell.sites, whole.cache, steps=cell.window, from_rows=[2, 3, 0, 1])
        values.append(blueness(reader.run(prompts, edits=edit, seeds=seeds, **STEPS)).numpy())
    base = blueness(whole).double().numpy()
    return Grid(tuple(cells), whole.rows, np.array(values), base, None, "resample")


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_the_grid_is_that_of_localise(experiment, reader, tmp_path, kind) -> None:
    results = experiment(
        metrics=[Blueness()],
        data={"prompts": PROMPTS},
        seeds=SEEDS,
        method={
            "kind": "ablate",
            "ablation": kind,
            "sites": SITES,
            "windows": 2,
            "random_sets": 0,
        },
        batch={"rows": 6},
    ).run(tmp_path / "run")
    cells = grid(reader, SITES, windows=2, steps=2)
    prompts, seeds = [p for p in PROMPTS for _ in SEEDS], SEEDS * 2
    if kind == "resample":
        expected = resampled(reader, prompts, seeds, cells)
    else:
        expected = ablate_grid(
            reader, prompts, cells, metric=blueness, kind=kind, seeds=seeds, floor=None, **STEPS
        )
    found = effects(results, "ablated")
    moved = np.abs(expected.values - expected.base).max()
    assert found.cells == expected.cells and moved > 1e-4
    assert np.abs(found.base - expected.base).max() < 1e-4
    assert np.abs(found.values - expected.values).max() < 0.01 * moved


def test_random_sets_are_cells_of_their_own(experiment, tmp_path) -> None:
    made = experiment(
        metrics=[Blueness()],
        method={"kind": "ablate", "ablation": "zero", "sites": "unet.**.attn2", "random_sets": 2},
        batch={"rows": 48},
    )
    results = made.run(tmp_path / "run")
    sites = len(made.job.reader.sites("unet.**.attn2"))
    assert len(results.of("random_sites")) == 2 * sites * 2
    control = effects(results, "random_sites")
    assert len(control.cells) == len({cell.label for cell in control.cells}) == 2 * sites
    assert np.isfinite(control.values).all()
    for cell, values in zip(control.cells, control.values, strict=True):
        rows = results.of("random_sites", cell=cell.label)
        assert [row["blueness"] for row in rows] == values.tolist()
    assert {row["set"] for row in results.of("random_sites")} == {0, 1}
    # the same values where the same site was drawn: labels do not mix
    by_site: dict[tuple[str, ...], list[float]] = {}
    for cell, values in zip(control.cells, control.values, strict=True):
        assert np.allclose(by_site.setdefault(cell.sites, values), values, atol=1e-5)


def test_a_floor_makes_shares_of_differences(experiment, tmp_path) -> None:
    method = {"kind": "ablate", "sites": SITES[1], "random_sets": 0, "ablation": "zero"}
    fields = {"metrics": [Blueness()], "seeds": 2}
    plain = experiment(method=method, **fields).run(tmp_path / "a")
    share = experiment(method={**method, "floor": -1.0}, **fields).run(tmp_path / "b")
    one, other = (effects(each, "ablated") for each in (plain, share))
    expected = (one.values - one.base).sum() / (-1 - one.base).sum()
    assert one.goal is None and other.effects[0].value == pytest.approx(expected, rel=1e-6)


def test_resampling_needs_another_row(experiment, tmp_path) -> None:
    method = {"kind": "ablate", "sites": SITES[1], "random_sets": 0, "ablation": "resample"}
    with pytest.raises(InvalidInput, match="method.ablation: resample needs a second row"):
        experiment(data={"prompts": ["a star"]}, method=method).plan()
    with pytest.raises(InvalidInput, match="batch: resample takes values from another row of the"):
        experiment(method=method, batch={"rows": 1}).plan()
    # three rows in batches of two: one would be left alone
    with pytest.raises(InvalidInput, match="2 rows in one leave some of the 3 alone"):
        experiment(method=method, batch={"rows": 2}, data={"prompts": ["a", "b", "c"]}).plan()
    plan = experiment(method=method, batch={"rows": 4}, data={"prompts": list("abcde")}).plan()
    assert [unit.stop - unit.start for unit in plan.units] == [2, 2, 3, 3]


@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_a_reference_gives_what_is_put_in(experiment, reader, tmp_path, kind) -> None:
    others = ["a large green star", "a small blue square", "a yellow cross"]
    results = experiment(
        metrics=[Blueness()],
        data={"prompts": PROMPTS},
        seeds=SEEDS,
        method={
            "kind": "ablate",
            "ablation": kind,
            "sites": SITES,
            "windows": 2,
            "random_sets": 0,
            "reference": {"prompts": others},
            "reference_seeds": [5, 6],
        },
        batch={"rows": 4},  # the reference takes two batches
    ).run(tmp_path / "run")
    cells = grid(reader, SITES, windows=2, steps=2)
    prompts, seeds = [p for p in PROMPTS for _ in SEEDS], SEEDS * 2
    more, more_seeds = [p for p in others for _ in (5, 6)], [5, 6] * 3
    if kind == "mean":
        wanted = ablate_grid(
            reader,
            prompts,
            cells,
            metric=blueness,
            kind="mean",
            seeds=seeds,
            reference=more,
            reference_seeds=more_seeds,
            floor=None,
            **STEPS,
        ).values
    else:
        cache = reader.run(more, record=SITES, seeds=more_seeds, **STEPS).cache
        wanted = np.array(
            [
                blueness(
                    reader.run(
                        prompts,
                        edits=Patch(c.sites, cache, steps=c.window, from_rows=[0, 1, 2, 3]),
                        seeds=seeds,
                        **STEPS,
                    )
                ).numpy()
                for c in cells
            ]
        )
    found = effects(results, "ablated")
    moved = np.abs(wanted - found.base).max()
    assert moved > 1e-4 and np.abs(found.values - wanted).max() < 0.01 * moved


def test_zero_takes_no_reference(experiment) -> None:
    method = {"kind": "ablate", "sites": SITES[1], "ablation": "zero"}
    method |= {"reference": {"prompts": ["a star"]}}
    with pytest.raises(InvalidInput, match="method.reference: zero draws on nothing"):
        experiment(data={"prompts": PROMPTS}, method=method).plan()


def test_the_prompts_of_the_reference_are_part_of_the_fingerprint(experiment, tmp_path) -> None:
    path = tmp_path / "others.txt"
    path.write_text("a green star\n")
    method = {"kind": "ablate", "sites": SITES[1], "random_sets": 0}
    method |= {"reference": {"file": str(path)}, "reference_seeds": 2}
    experiment(method=method).run(tmp_path / "run")
    path.write_text("a yellow cross\n")
    with pytest.raises(InvalidInput, match="holds another run: settings.inputs.reference was "):
        experiment(method=method).run(tmp_path / "run")


def test_a_reference_of_unequal_prompts_is_averaged_token_by_token(language, tmp_path) -> None:
    reference = ["a cat", "a red dog on a tree", "the blue cat"]
    rows = [{"prompt": "a dog", "answer": 40, "wrong_answer": 41}]
    found = []
    for size in (1, 3):
        job = Experiment(
            name="mean",
            reader=language,
            data={"prompts": rows},
            method={
                "kind": "ablate",
                "sites": "transformer.h.*",
                "ablation": "mean",
                "reference": {"prompts": [{"prompt": each} for each in reference]},
                "random_sets": 0,
            },
            metrics=["logit_difference"],
            batch={"rows": size},
        ).run(tmp_path / str(size))
        found.append(effects(job, "ablated").values)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-4)
    cells = grid(language, "transformer.h.*")
    cache = language.run(reference, record=[cell.sites[0] for cell in cells]).cache
    for cell, [value] in zip(cells, found[1], strict=True):
        edit = Ablate(cell.sites, "mean", source=cache)
        last = language.run("a dog", edits=edit).output.logits[0, -1]
        assert value == pytest.approx(float(last[40] - last[41]), abs=1e-3)
