"""Rows of a run as numbers."""

import math

import pytest

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments import load_results


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
