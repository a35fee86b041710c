"""Patching in experiments gives the grid of `dreamreader.localise`."""

from typing import Any

import numpy as np
import pytest
import torch

from dreamreader.engine import Reader, RunResult
from dreamreader.errors import InvalidInput
from dreamreader.experiments import Experiment
from dreamreader.experiments.pages import page_of
from dreamreader.experiments.pages.chunked import effects
from dreamreader.localise import Grid, grid, patch_grid, window_cells
from dreamreader.zoo import SETTINGS

from ..conftest import PAIRS

STEPS = {**SETTINGS, "num_inference_steps": 2, "output_type": "pt"}
SEEDS = [3, 4]
SITES = ["unet.up_blocks.1", "unet.up_blocks.2"]


def blueness(result: RunResult) -> torch.Tensor:
    return (result.images[:, 2] - result.images[:, 0]).mean((1, 2))


class Blueness:
    name = "blueness"
    needs = frozenset({"images"})
    compares = False

    def measure(self, got: Any, reference: Any) -> dict[str, list[float]]:
        return {"blueness": (got.images[:, 2] - got.images[:, 0]).mean((1, 2)).tolist()}


def by_hand(reader: Reader, cells: list[Any], direction: str = "restore") -> Grid:
    sources, targets = ([p[k] for p in PAIRS for _ in SEEDS] for k in ("source", "target"))
    return patch_grid(
        reader,
        targets,
        sources,
        cells,
        metric=blueness,
        seeds=SEEDS * 2,
        direction=direction,
        **STEPS,
    )


def close(found: Grid, expected: Grid) -> None:
    assert [cell.as_dict() for cell in found.cells] == [c.as_dict() for c in expected.cells]
    moved = np.abs(expected.values - expected.base).max()
    assert moved > 1e-4
    assert found.goal is not None and expected.goal is not None
    for one, other in (
        (found.values, expected.values),
        (found.base, expected.base),
        (found.goal, expected.goal),
    ):
        assert np.abs(one - other).max() < 1e-3 * max(moved, 1e-2)
    for one, other in zip(found.effects, expected.effects, strict=True):
        assert one.value == pytest.approx(other.value, abs=5e-3)


@pytest.mark.parametrize("direction, rows", [("restore", 3), ("restore", 16), ("corrupt", 16)])
def test_the_grid_is_that_of_localise(experiment, reader, tmp_path, direction, rows) -> None:
    made = experiment(
        metrics=[Blueness()],
        data={"pairs": PAIRS},
        seeds=SEEDS,
        method={
            "kind": "patch",
            "sites": SITES,
            "windows": 2,
            "branch": "cond",
            "direction": direction,
        },
        batch={"rows": rows},
    )
    results = made.run(tmp_path / "run")
    cells = grid(reader, SITES, windows=2, steps=2, branch="cond")
    found = effects(results, "patched")
    close(found, by_hand(reader, cells, direction))
    # corrupted activations of another pair move something else
    other = effects(results, "resampled")
    assert np.abs(other.values - found.values).max() > 1e-4
    assert {r["prompt"] for r in results.of("patched")} == {
        pair["source" if direction == "restore" else "target"] for pair in PAIRS
    }
    assert any("up_blocks.1" in line for line in page_of(results).summary())


def test_the_source_is_recorded_again_where_a_run_goes_on(experiment, tmp_path) -> None:
    """A chunk's cells get the same values as without a stop, to the bit."""
    fields = {
        "data": {"pairs": PAIRS},
        "method": {"kind": "patch", "sites": SITES[1], "windows": 2},
        "batch": {"rows": 2},
    }
    whole = experiment(**fields).run(tmp_path / "whole").rows

    class Stop:
        name, needs, compares = "stop", frozenset({"images"}), False

        def measure(self, got: Any, reference: Any) -> dict[str, list[float]]:
            if got.column("condition")[0] == "patched" and got.column("row")[0] > 4:
                raise KeyboardInterrupt
            return {}

    with pytest.raises(KeyboardInterrupt):
        experiment(metrics=["pixel_distance", Stop()], **fields).run(tmp_path / "run")

    class Go(Stop):
        def measure(self, got: Any, reference: Any) -> dict[str, list[float]]:
            return {}

    rows = experiment(metrics=["pixel_distance", Go()], **fields).run(tmp_path / "run").rows
    assert rows == whole


def test_windows_are_those_of_localise(experiment, reader, tmp_path) -> None:
    results = experiment(
        metrics=[Blueness()],
        data={"pairs": PAIRS},
        seeds=SEEDS,
        method={"kind": "windows", "span": 4, "controls": []},
        batch={"rows": 48},
    ).run(tmp_path / "run")
    assert results.conditions == ["corrupted", "clean", "patched"]
    found = effects(results, "patched")
    close(found, by_hand(reader, window_cells(reader, 4)))


def test_layer_by_position_of_a_language_model(language, tmp_path) -> None:
    pairs = [
        {"source": "a blue cat", "target": "a red cat", "answer": 40, "wrong_answer": 41},
        {
            "source": "a cat on a red tree",
            "target": "a dog on a red tree",
            "answer": 50,
            "wrong_answer": 60,
        },
    ]
    results = Experiment(
        name="positions",
        reader=language,
        data={"pairs": pairs},
        method={"kind": "patch", "sites": "transformer.h.*", "tokens": "each", "positions": 3},
        metrics=["logit_difference"],
        batch={"rows": 5},
    ).run(tmp_path / "run")
    answers = torch.tensor([[40, 41], [50, 60]])

    def metric(result: RunResult) -> torch.Tensor:
        last = result.output.logits[:, -1]
        right, wrong = answers[[row.index for row in result.rows]].unbind(1)
        rows = torch.arange(len(last))
        return last[rows, right] - last[rows, wrong]

    cells = grid(language, "transformer.h.*", tokens="each", positions=3)
    expected = patch_grid(
        language, [p["target"] for p in pairs], [p["source"] for p in pairs], cells, metric=metric
    )
    close(effects(results, "patched"), expected)
    assert not (tmp_path / "run" / "artifacts" / "images").exists()


def test_pairs_of_unequal_length_need_tokens_that_all_have(language, tmp_path) -> None:
    pairs = [
        {"source": "a cat", "target": "a red cat", "answer": 40, "wrong_answer": 41},
        {"source": "a red dog", "target": "a blue dog", "answer": 50, "wrong_answer": 60},
    ]
    asked: dict[str, Any] = {"name": "x", "reader": language, "data": {"pairs": pairs}}
    asked |= {"metrics": ["logit_difference"]}
    method: dict[str, Any] = {"kind": "patch", "sites": "transformer.h.1"}
    with pytest.raises(
        InvalidInput, match="method.controls: resampled gives .* they have [0-9]+ t"
    ):
        Experiment(**asked, method=method).plan()
    with pytest.raises(InvalidInput, match="pair 0: tokens? [0-9 .]+ of the clean prompt 'a red c"):
        Experiment(**asked, method={**method, "direction": "corrupt"}).plan()
    for changes in ({"controls": []}, {"tokens": [0, 1]}):
        results = Experiment(**asked, method={**method, **changes}).run(tmp_path / str(changes))
        assert np.isfinite(effects(results, "patched").values).all()


def test_what_patching_needs(experiment, language, tmp_path) -> None:
    with pytest.raises(InvalidInput, match="data, for method patch: entry '0' has no target prom"):
        experiment(method={"kind": "patch", "sites": SITES[1]}).plan()
    with pytest.raises(InvalidInput, match="method windows needs a diffusers pipeline"):
        Experiment(
            name="x",
            reader=language,
            data={"pairs": [{"source": "a red cat", "target": "a blue cat"}]},
            method={"kind": "windows"},
        ).plan()
    with pytest.raises(LookupError, match="unknown site 'unet.mid_blok'; nearest: unet.mid_block"):
        experiment(data={"pairs": PAIRS}, method={"kind": "patch", "sites": "unet.mid_blok"}).plan()
