"""What differs between runs, and whether rows can be repeated."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dreamreader._checked import read_table, write_table
from dreamreader._progress import ProgressEvent
from dreamreader.errors import InvalidInput
from dreamreader.experiments import Experiment, diff, verify
from dreamreader.experiments.folder import RunFolder
from dreamreader.jobs.differences import differences

from .conftest import MIDDLE, PAIRS

METHODS: dict[str, dict[str, Any]] = {
    "patch": {"kind": "patch", "sites": MIDDLE, "windows": 2},
    "ablate": {"kind": "ablate", "sites": "unet.**.attn2", "group": "all", "random_sets": 0},
    "steer": {"kind": "steer", "sites": MIDDLE, "fit": {"pairs": PAIRS}, "strengths": [1.0]},
    "lens": {"kind": "lens", "layers": [0, 1]},
}


def checked(made: Experiment, path: Path, count: int = 100) -> Any:
    return verify(Experiment(made.spec, reader=made.job.reader).job, RunFolder(path), count)


def changed(path: Path, row: int, column: str, value: Any) -> None:
    """Writes another value into the rows of a run."""
    table = read_table(path / "rows.parquet")
    rows = table.to_pylist()
    assert rows[row][column] != value
    rows[row][column] = value
    new = pa.Table.from_pylist(rows, schema=table.schema)
    write_table(path / "rows.parquet", new)


@pytest.mark.parametrize("kind", list(METHODS))
def test_every_row_of_a_run_can_be_repeated(experiment, tmp_path, kind) -> None:
    made = experiment(data={"pairs": PAIRS}, method=METHODS[kind], metrics=["pixel_distance"])
    results = made.run(tmp_path / "run")
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    verdict = checked(made, tmp_path / "run")
    assert verdict.holds and verdict.checked == list(range(len(results.rows)))
    assert before == {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}


def test_an_experiment_that_has_just_run_can_be_verified(experiment, tmp_path) -> None:
    """What its last batches left in memory is not taken for what the first ones need."""
    made = experiment(
        data={"pairs": [*PAIRS, {"source": "a red star", "target": "a blue star"}]},
        method=METHODS["patch"],
        batch={"rows": 1},
    )
    made.run(tmp_path / "run")
    assert verify(made.job, RunFolder(tmp_path / "run"), 100).holds


def test_a_sample_is_drawn_from_all_rows(experiment, tmp_path) -> None:
    made = experiment(seeds={"count": 3}, batch={"rows": 3})
    made.run(tmp_path / "run")
    job, folder = Experiment(made.spec, reader=made.job.reader).job, RunFolder(tmp_path / "run")
    events: list[ProgressEvent] = []
    verdict = verify(job, folder, 2, seed=3, progress=events.append)
    assert verdict.holds and len(verdict.checked) == 2
    assert events[-1].stage == "batches" and 1 <= events[-1].done <= 2
    assert verify(job, folder, 2, seed=4).checked != verdict.checked
    with pytest.raises(InvalidInput, match="verify: count must be at least 1, got 0"):
        verify(job, folder, 0)


@pytest.mark.parametrize(
    "column, value", [("pixel_distance", 0.25), ("digest", "0"), ("prompt", "a"), ("unit", 7)]
)
def test_a_changed_value_is_named_with_row_and_column(experiment, tmp_path, column, value) -> None:
    made = experiment()
    right = made.run(tmp_path / "run").rows[4][column]
    changed(tmp_path / "run", 4, column, value)
    verdict = checked(made, tmp_path / "run")
    assert not verdict.holds and verdict.different == [(4, column, value, right)]


def test_only_a_complete_run_of_the_same_subject_is_verified(experiment, tmp_path) -> None:
    made = experiment()
    with pytest.raises(InvalidInput, match="run is no run folder"):
        checked(made, tmp_path / "run")
    made.run(tmp_path / "run")
    with pytest.raises(InvalidInput, match="holds another run: settings.spec.seeds.count was 1, i"):
        checked(experiment(seeds={"count": 2}), tmp_path / "run")


def test_equal_runs_do_not_differ(experiment, tmp_path) -> None:
    for name in "ab":
        experiment(metrics=["pixel_distance", "detector"]).run(tmp_path / name)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.spec == found.fingerprint == found.machine == found.metrics == []
    assert found.same_rows == 6 and found.rows == (6, 6)


def test_another_strength_and_other_seeds(experiment, tmp_path) -> None:
    experiment().run(tmp_path / "a")
    method = experiment().spec.method.model_dump()
    weaker = {**method, "sweep": {"factor": [1.0, 0.0]}}
    experiment(method=weaker).run(tmp_path / "b")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.spec == [("method.sweep.factor", [1.0, 0.5], [1.0, 0.0])]
    assert found.fingerprint == [] and found.same_rows == 4
    [(name, old, new), *_] = [each for each in found.metrics if "distance" in each[0]]
    assert name == "edited, pixel_distance" and 0 < old < new
    experiment(seeds=[7, 8]).run(tmp_path / "c")
    found = diff(tmp_path / "a", tmp_path / "c")
    assert ("seeds", [0], [7, 8]) in found.fingerprint and found.rows == (6, 12)
    assert found.same_rows == 0 and [name.split(".")[0] for name, *_ in found.spec] == ["seeds"]


def test_a_folder_that_is_no_run_has_no_differences(experiment, tmp_path) -> None:
    experiment().run(tmp_path / "a")
    with pytest.raises(InvalidInput, match="none is no run folder"):
        diff(tmp_path / "a", tmp_path / "none")


def test_differences_of_nested_values() -> None:
    a = {"x": {"y": 1, "z": float("nan")}, "only": 2, "list": [1, 2]}
    b = {"x": {"y": 2, "z": float("nan")}, "list": [1, 3], "more": {"deep": None}}
    assert list(differences(a, b)) == [
        ("x.y", 1, 2),
        ("only", 2, None),
        ("list", [1, 2], [1, 3]),
        ("more", None, {"deep": None}),
    ]
