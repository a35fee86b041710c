"""Plans: what a run would do, without doing it."""

import time
from typing import Any

import pytest

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments import Experiment
from dreamreader.experiments.plan import probe, time_of_row
from dreamreader.specs.batch import MOST_ROWS

from .conftest import MIDDLE, PAIRS


@pytest.fixture
def calls(reader: Reader):
    """Rows of each call of the denoiser."""
    seen: list[int] = []
    handle = reader.subject.unet.register_forward_pre_hook(
        lambda m, args: seen.append(len(args[0]))
    )
    yield seen
    handle.remove()


def test_a_plan_says_rows_batches_sites_memory_and_time(experiment, calls, tmp_path) -> None:
    made = experiment(seeds={"count": 3})
    plan = made.plan()
    assert len(plan.rows) == 18 and plan.conditions == {"unedited": 6, "edited": 12}
    assert {unit.stop - unit.start for unit in plan.units} == {3, 4}
    assert len(plan.units) == 5 and plan.row_bytes > 10_000 and plan.seconds > 0
    lines = repr(plan).splitlines()
    assert lines[0] == "rows      18: 6 unedited, 12 edited"
    assert lines[1] == "batches   5 of up to 4 rows"
    assert lines[3].startswith("memory    about ") and lines[3].endswith("GiB for activations")
    assert lines[4].startswith("time      about ")
    # one row for a step; four rows for a step and for three: guidance doubles them
    assert calls == [2, 8, 8, 8, 8] and made.job.folder is None


def test_sites_of_cells_are_listed(experiment) -> None:
    made = experiment(
        data={"pairs": PAIRS}, method={"kind": "patch", "sites": "unet.**.attn2", "controls": []}
    )
    plan = made.plan()
    assert len(plan.sites) == len(made.job.reader.sites("unet.**.attn2"))
    lines = repr(plan).splitlines()
    assert lines[2] == f"sites     {len(plan.sites)}" and f"          {plan.sites[0]}" in lines
    assert f"          ... {len(plan.sites) - 6} more" in lines


def test_the_estimate_of_memory_grows_with_the_picture(experiment, reader) -> None:
    small = probe(experiment().job)
    wide = probe(experiment(pipeline={"num_inference_steps": 2, "height": 128, "width": 64}).job)
    assert 1.5 * small < wide < 3 * small


def test_the_memory_allowed_decides_the_batch(experiment) -> None:
    row = probe(experiment().job)
    for rows in (1, 5):
        allowed = (rows + 0.5) * row / 2**30
        plan = experiment(seeds={"count": 30}, batch={"memory": allowed}).plan()
        assert plan.batch <= rows and len(plan.units) == -(-180 // rows)
    assert experiment(seeds={"count": 30}, batch={"memory": 1e6}).plan().batch <= MOST_ROWS
    assert len(experiment(seeds={"count": 30}, batch={"memory": 1e6}).plan().units) == -(
        -180 // MOST_ROWS
    )
    with pytest.raises(InvalidInput, match=r"batch.memory: one row takes about .* GiB, .* GiB are"):
        experiment(batch={"memory": row / 2**31}).plan()


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"seeds": {"count": 10_000_000}},
            r"the sweep has 40,000,000 rows \(2 prompts x 10,000,000 seeds x 2 factor\)",
        ),
        (
            {
                "seeds": {"count": 5000},
                "method": {
                    "kind": "edit",
                    "edits": [
                        {"kind": "scale", "site": "unet.conv_in", "factor": "$a", "steps": "$b"}
                    ],
                    "sweep": {"a": list(range(1000)), "b": [0, 1]},
                },
            },
            r"the sweep has 20,000,000 rows \(2 prompts x 5,000 seeds x 1,000 a x 2 b\)",
        ),
        (
            {
                "data": {"pairs": PAIRS},
                "seeds": {"count": 100_000},
                "method": {"kind": "patch", "sites": "unet.**.attn2", "windows": 2},
            },
            r"the sweep has 5,600,000 rows \(28 cells x 2 prompts x 100,000 seeds\)",
        ),
        (
            {
                "data": {"pairs": PAIRS},
                "method": {
                    "kind": "patch",
                    "sites": "unet.**.attn2",
                    "tokens": "each",
                    "positions": 10_000_000,
                },
            },
            r"the sweep has 20,000,000 rows \(10,000,000 positions x 2 prompts\)",
        ),
        (
            {"seeds": {"count": 100_000}, "method": {"kind": "ablate", "sites": "unet.**.attn2"}},
            r"the sweep has 5,600,000 rows \(28 cells x 2 prompts x 100,000 seeds\)",
        ),
        (
            {"data": {"pairs": PAIRS}, "seeds": {"count": 500_000}, "method": {"kind": "windows"}},
            r"the sweep has 14,000,000 rows \(14 cells x 2 prompts x 500,000 seeds\)",
        ),
        (
            {"seeds": {"count": 1_000_000}, "method": {"kind": "lens"}},
            r"the sweep has \d,000,000 rows \(\d layers x 2 prompts x 1,000,000 seeds\)",
        ),
        (
            {"seeds": {"count": 10_000_000}, "method": {"kind": "heatmap", "word": "red"}},
            r"the sweep has 20,000,000 rows \(2 prompts x 10,000,000 seeds\)",
        ),
        (
            {
                "seeds": {"count": 10_000},
                "method": {
                    "kind": "steer",
                    "sites": MIDDLE,
                    "fit": {"pairs": PAIRS},
                    "strengths": list(range(200)),
                },
            },
            r"has 12,000,000 rows \(2 prompts x 10,000 seeds x 200 strengths x 3 conditions\)",
        ),
    ],
)
def test_ten_million_rows_are_refused_before_anything_runs(
    experiment, calls, tmp_path, changes, text
) -> None:
    made = experiment(**changes)
    began = time.process_time()
    with pytest.raises(InvalidInput, match=text):
        made.run(tmp_path / "run")
    assert time.process_time() - began < 2 and calls == []
    assert "rows" not in made.job.__dict__ and not (tmp_path / "run" / "plan.json").exists()


def test_a_language_model_has_a_plan(language) -> None:
    made = Experiment(
        name="heads",
        reader=language,
        data={"prompts": ["a red cat"]},
        method={"kind": "ablate", "sites": "transformer.h.*.attn:heads", "heads": [0]},
        metrics=["perplexity"],
    )
    plan = made.plan()
    assert plan.conditions == {"unedited": 1, "ablated": 3, "random_sites": 9}
    with pytest.raises(InvalidInput, match="method.windows: a language model has no denoising st"):
        Experiment(
            made.spec.model_copy(
                update={"method": made.spec.method.model_copy(update={"windows": 2})}
            ),
            reader=language,
        ).plan()


def test_what_a_call_takes_is_shared_by_its_rows(language, monkeypatch) -> None:
    method = {"kind": "ablate", "sites": "transformer.h.*.attn:heads", "heads": [0]}
    job = Experiment(
        name="heads", reader=language, data={"prompts": ["a red cat"]}, method=method
    ).job
    monkeypatch.setattr(
        type(job), "draw", lambda self, prompts, seeds, **_: time.sleep(0.08 + 0.02 * len(prompts))
    )
    assert time_of_row(job, 1) == pytest.approx(0.1, rel=0.2)
    assert time_of_row(job, 40) == pytest.approx(0.022, rel=0.3)


def test_a_column_of_the_data_that_is_an_axis(experiment) -> None:
    made = experiment(data={"prompts": [{"prompt": "a star", "factor": 3}]})
    with pytest.raises(InvalidInput, match="data: the column 'factor' is also an axis of the meth"):
        made.plan()


def test_an_effect_that_no_metric_gives_is_refused_before_anything_runs(experiment, calls) -> None:
    def plan(effect: str, *metrics: Any) -> None:
        method = {"kind": "patch", "sites": MIDDLE, "effect": effect}
        experiment(data={"pairs": PAIRS}, method=method, metrics=list(metrics)).plan()

    with pytest.raises(UnknownName, match="method.effect: .* 'sceneright'; nearest: scene_right"):
        plan("sceneright", "scene", "pixel_distance")
    with pytest.raises(UnknownName, match="method.effect: .* 'color'; nearest: color_kept"):
        plan("color", "detector")  # which is a name
    with pytest.raises(UnknownName, match="method.effect: .* 'color_kept'"):
        plan("color_kept", {"detector": {"kept": False}})
    with pytest.raises(UnknownName, match="'noise_distance_2'; nearest: noise_distance_"):
        plan("noise_distance_2", {"noise_distance": {"steps": [0, 1]}})
    with pytest.raises(InvalidInput, match="'tint' is a column of a metric; name it in metrics"):
        plan("tint")
    assert not calls
    plan("tint", "tint")
    plan("noise_distance_1", "noise_distance")  # of all steps: a run tells
    assert calls


def test_pairs_of_a_language_model_need_as_many_tokens(language) -> None:
    made = Experiment(
        name="x",
        reader=language,
        data={"pairs": [{"source": "a red cat", "target": "a cat"}]},
        method={"kind": "patch", "sites": "transformer.h.*"},
    )
    with pytest.raises(
        InvalidInput, match="pair 0: token 2 of the corrupted prompt .*which has 2 tokens"
    ):
        made.plan()


def test_a_plan_does_not_bind_the_run(experiment, tmp_path, monkeypatch) -> None:
    """Rows that depend on the batch are made anew where more memory is free than at the plan."""
    fields = {
        "data": {"pairs": PAIRS},
        "method": {"kind": "patch", "sites": MIDDLE},
        "batch": {"rows": "auto"},
    }
    made = experiment(**fields)
    row = probe(made.job)
    free = {"bytes": 2 * 1.5 * row}
    monkeypatch.setattr("dreamreader.engine.available_memory", lambda: free["bytes"])
    assert made.plan().batch == 1
    free["bytes"] = 2 * 4.5 * row
    rows = made.run(tmp_path / "a").rows
    assert rows == experiment(**fields).run(tmp_path / "b").rows
    assert [row["condition"] for row in rows[:4]] == ["corrupted"] * 2 + ["clean"] * 2
