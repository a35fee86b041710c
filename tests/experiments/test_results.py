"""Rows of a run as numbers."""

import math

import pytest

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments import load_results
from dreamreader.experiments.folder import RunFolder
from dreamreader.experiments.results import Results


def test_results_are_means_over_rows(experiment, tmp_path) -> None:
    results = experiment(metrics=["pixel_distance", "detector"], seeds={"count": 2}).run(
        tmp_path / "run"
    )
    assert results.conditions == ["unedited", "edited"]
    assert len(results.rows) == 2 * 2 * 3 and len(results.of("edited", factor=0.5)) == 4
    values = [row["pixel_distance"] for row in results.of("edited", factor=0.5)]
    assert results.mean("edited", "pixel_distance", factor=0.5).value == pytest.approx(
        sum(values) / 4
    )
    assert min(values) > 0
    assert results.mean("unedited", "pixel_distance").value == 0
    assert results.mean("edited", "color", factor=3).n == 0
    assert "color" in results.metrics and "color" not in results.numbers
    assert results.where(item="0").mean("edited", "pixel_distance").n == 4
    assert results.effect_column(None, "edited", "unedited") == "pixel_distance"
    with pytest.raises(UnknownName, match="unknown metric 'pixel'; nearest: pixel_distance"):
        results.effect_column("pixel", "edited", "unedited")
    lines = results.axis_lines("factor", "edited")
    assert [line.split(":")[0].strip() for line in lines] == ["factor 0.5", "factor 1.0"]
    assert results.image(results.rows[0]).size == (64, 64)
    assert load_results(tmp_path / "run").rows == results.rows


def test_results_without_numbers(experiment, tmp_path) -> None:
    results = experiment(metrics=[]).run(tmp_path / "run")
    assert results.numbers == [] and math.isnan(results.mean("edited", "tint").value)
    with pytest.raises(InvalidInput, match="the spec has no metric that gives numbers"):
        results.effect_column(None, "edited", "unedited")


def test_a_folder_without_results(tmp_path) -> None:
    with pytest.raises(InvalidInput, match="nothing is no run folder"):
        load_results(tmp_path / "nothing")


def test_the_mean_of_truth_values_has_the_interval_of_a_share(tmp_path) -> None:
    rows = [{"condition": "a", "hit": n < 3, "size": float(n)} for n in range(10)]
    results = Results(RunFolder(tmp_path), None, rows, ["hit", "size"])
    found, n, z = results.mean("a", "hit"), 10, 1.959964
    share, width = 0.3, z * math.sqrt(0.3 * 0.7 / n + z * z / (4 * n * n))
    low, high = ((share + z * z / (2 * n) + s * width) / (1 + z * z / n) for s in (-1, 1))
    assert (found.value, found.low, found.high) == pytest.approx((share, low, high), abs=1e-6)
    size = results.mean("a", "size")
    assert size.value == 4.5 and 2.5 < size.low < 3.5 and 5.5 < size.high < 6.5
    assert results.mean("a", "hit", size=0.0).low > 0.2  # one of one: a bootstrap would be sure
