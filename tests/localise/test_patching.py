"""Patch and ablation grids against one run after another."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from dreamreader.edits import Ablate, Patch
from dreamreader.engine import Reader, RunResult
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.localise import Cell, ablate_grid, grid, patch_grid

SETTINGS = {**tiny.arguments("sd"), "output_type": "pt"}
CLEAN, CORRUPTED = ["a red cat", "a dog on a tree"], ["a blue cat", "a red dog in a tree"]
SEEDS = [5, 6]


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(tiny.pipeline("sd"))


@pytest.fixture(scope="module")
def cells(reader: Reader) -> list[Cell]:
    return grid(reader, "unet.*_blocks.1.**.attn2", windows=2, steps=4, branch="cond")


def metric(result: RunResult) -> torch.Tensor:
    return result.images[:, 0].flatten(1)[:, ::7].mean(1)


def test_a_patch_grid_is_a_loop_of_single_runs(reader: Reader, cells: list[Cell]) -> None:
    sites = list({site for cell in cells for site in cell.sites})
    for direction, giving, taking in (
        ("restore", CLEAN, CORRUPTED),
        ("corrupt", CORRUPTED, CLEAN),
    ):
        found = patch_grid(
            reader,
            CLEAN,
            CORRUPTED,
            cells,
            metric=metric,
            seeds=SEEDS,
            direction=direction,
            batch_size=4,
            **SETTINGS,
        )
        given = reader.run(giving, record=sites, seeds=SEEDS, **SETTINGS)
        base = metric(reader.run(taking, seeds=SEEDS, **SETTINGS))
        goal = metric(given)
        for cell, values, effect in zip(cells, found.values, found.effects, strict=True):
            edits = [Patch(s, given.cache, steps=cell.window, branch="cond") for s in cell.sites]
            alone = metric(reader.run(taking, edits=edits, seeds=SEEDS, **SETTINGS))
            moved = (alone - base).abs().max()
            assert moved > 1e-5
            assert np.abs(values - alone.numpy()).max() < 0.02 * moved
            expected = float((alone - base).sum() / (goal - base).sum())
            assert effect.value == pytest.approx(expected, rel=0.05)


def test_a_whole_state_restores_everything(reader: Reader) -> None:
    cells = [Cell("end", "unet.conv_out"), Cell("start", "unet.conv_in", (0, 1), "cond")]
    found = patch_grid(reader, CLEAN, CORRUPTED, cells, metric=metric, seeds=SEEDS, **SETTINGS)
    assert found.effects[0].value == pytest.approx(1, abs=1e-4)
    assert np.abs(found.values[0] - found.goal).max() < 1e-6
    # at the first step conv_in sees only the noise, which both runs share: nothing can change
    assert np.array_equal(found.values[1], found.base)
    assert found.p_values[1] == 1


def test_one_pair_with_seeds_and_arguments_for_each_row(reader: Reader, cells: list[Cell]) -> None:
    seen: list[tuple[int, ...]] = []

    def watching(result: RunResult) -> torch.Tensor:
        seen.append(tuple(row.index for row in result.rows))
        return metric(result)

    more = {**SETTINGS, "negative_prompt": ["a fish", "a tree", "a boat"]}
    found = patch_grid(
        reader,
        CLEAN[0],
        CORRUPTED[0],
        cells,
        metric=watching,
        seeds=[1, 2, 3],
        batch_size=3,
        **more,
    )
    assert [row.seed for row in found.rows] == [1, 2, 3]
    # both unchanged runs, then whole cells: four batches of three rows in a run
    assert seen == [(0, 1, 2), (0, 1, 2), (0, 1, 2) * 4, (0, 1, 2) * 2]
    other = reader.run(CORRUPTED[0], seeds=[1, 2, 3], **more)
    np.testing.assert_allclose(found.base, metric(other), atol=1e-5)


def test_an_ablation_grid_is_a_loop_of_single_runs(reader: Reader, cells: list[Cell]) -> None:
    base = metric(reader.run(CLEAN, seeds=SEEDS, **SETTINGS))
    own = reader.run(
        CORRUPTED, record=[s for c in cells[::2] for s in c.sites], seeds=SEEDS, **SETTINGS
    )
    for kind, extra in (("zero", {}), ("mean", {"source": own.cache})):
        given = {"reference": CORRUPTED} if kind == "mean" else {}
        found = ablate_grid(
            reader,
            CLEAN,
            cells,
            metric=metric,
            kind=kind,
            seeds=SEEDS,
            batch_size=3,
            **given,
            **SETTINGS,
        )
        for cell, values, effect in zip(cells, found.values, found.effects, strict=True):
            edits = [Ablate(s, kind, steps=cell.window, branch="cond", **extra) for s in cell.sites]
            alone = metric(reader.run(CLEAN, edits=edits, seeds=SEEDS, **SETTINGS))
            moved = (alone - base).abs().max()
            assert np.abs(values - alone.numpy()).max() < 0.02 * moved + 1e-6
            expected = float((alone - base).sum() / (0 - base).sum())
            assert effect.value == pytest.approx(expected, rel=0.05, abs=1e-4)


def test_resampling_takes_another_pair_whatever_the_batch(reader: Reader, cells) -> None:
    arguments: dict[str, Any] = {"metric": metric, "kind": "resample", "seeds": SEEDS, **SETTINGS}
    found = ablate_grid(reader, CLEAN, cells, floor=None, batch_size=2, **arguments)
    again = ablate_grid(reader, CLEAN, cells, floor=None, **arguments)
    np.testing.assert_allclose(found.values, again.values, atol=1e-5)
    assert found.goal is None and np.abs(found.values - found.base).max() > 1e-4
    # of two rows each takes the values of the other one
    cell = cells[0]
    cache = reader.run(CLEAN, record=cell.sites, seeds=SEEDS, **SETTINGS).cache
    edit = Patch(cell.sites, cache, steps=cell.window, branch="cond", from_rows=[1, 0])
    swapped = metric(reader.run(CLEAN, edits=edit, seeds=SEEDS, **SETTINGS))
    np.testing.assert_allclose(found.values[0], swapped, atol=1e-5)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"clean": CLEAN[:1]}, "1 clean prompts and 2 corrupted ones"),
        ({"cells": []}, "the grid is empty: no cells"),
        ({"cells": ["unet"]}, "cells: a Cell expected, got str 'unet'"),
        ({"cells": [Cell("x", ())]}, "cell 'x' has no sites"),
        ({"seeds": [1, 2, 3]}, "rows do not fit: prompts has 2, seeds has 3"),
        ({"metric": 3}, "a function of a RunResult is needed, got 3"),
        ({"metric": lambda result: [1.0]}, r"one number for each of 2 rows is needed, got \[1\]"),
        ({"metric": lambda result: "ab"}, "metric: numbers are needed, got str"),
        ({"metric": lambda result: [float("inf"), 0]}, "1 of 2 values are infinite"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_patching_refuses_what_cannot_be(reader: Reader, cells, change, text) -> None:
    given: dict[str, Any] = {
        "clean": CLEAN,
        "corrupted": CORRUPTED,
        "cells": cells,
        "metric": metric,
        "seeds": SEEDS,
    }
    with pytest.raises(InvalidInput, match=text):
        patch_grid(reader, **{**given, **change}, **SETTINGS)


def test_unknown_names(reader: Reader, cells) -> None:
    with pytest.raises(UnknownName, match="unknown direction 'restored'; nearest: restore"):
        patch_grid(reader, "a", "b", cells, metric=metric, direction="restored")
    with pytest.raises(UnknownName, match="unknown site 'unet.mid'"):
        patch_grid(reader, "a", "b", [Cell("x", "unet.mid")], metric=metric)
    with pytest.raises(UnknownName, match="unknown kind of ablation in a sweep 'noise'"):
        ablate_grid(reader, "a", cells, metric=metric, kind="noise")


def test_ablating_refuses_what_cannot_be(reader: Reader, cells) -> None:
    with pytest.raises(InvalidInput, match="resample needs a second row"):
        ablate_grid(reader, "a", cells, metric=metric, kind="resample", **SETTINGS)
    with pytest.raises(InvalidInput, match="kind 'zero' takes no reference"):
        ablate_grid(reader, "a", cells, metric=metric, reference="b", **SETTINGS)
    with pytest.raises(InvalidInput, match=r"floor has \[2\] values, the run has 1 rows"):
        ablate_grid(reader, "a", cells, metric=metric, floor=[0.0, 1.0], **SETTINGS)
