"""Probe guidance in experiments: probes of `dreamreader.probes`, targets row by row, controls."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dreamreader.edits import ProbeGuidance, Steer
from dreamreader.engine import Reader, Record
from dreamreader.errors import InvalidInput
from dreamreader.experiments import Experiment
from dreamreader.experiments.methods import guide_probes
from dreamreader.experiments.page import build
from dreamreader.experiments.pages import page_of
from dreamreader.experiments.results import Results, format_interval
from dreamreader.probes import Probe
from dreamreader.stats.variation import variation_to_uniform

from ..conftest import MIDDLE
from .alone import STEPS, Stopping, check_alone

UP = "unet.up_blocks.2.attentions.0.transformer_blocks.0.attn2"
COLORS = ("blue", "green", "red")
FIT = [
    {"prompt": f"a {color} {shape}", "color": color, "shape": shape}
    for color in COLORS
    for shape in ("circle", "square", "star")
]
DATA = [
    {"prompt": "a small red circle", "was": "red", "id": "circle"},
    {"prompt": "a large blue square", "was": "blue", "id": "square"},
]
RED_TO_GREEN = {"scenes": {"count": 2, "source": {"color": "red"}, "target": {"color": "green"}}}
STRONG = 500.0  # turns the picture enough to tell one direction from its opposite
PROBE = {"hidden": [8], "pool": "token", "per_step": "shared", "epochs": 4, "holdout": 3}
METHOD: dict[str, Any] = {
    "kind": "guide",
    "sites": UP,
    "branch": "cond",
    "fit": {"prompts": FIT},
    "labels": {"color": "color"},
    "probe": PROBE | {"controls": False},
    "target": {"color": "blue"},
    "avoid": {"color": "was"},
    "strengths": [0.0, STRONG],
    "iterations": [1, 3],
    "trust": 6.0,
    "difference_strengths": [0.0, 16.0],
    "effect": "pixel_distance",
}
SMALL = METHOD | {"strengths": [STRONG], "iterations": [1], "difference_strengths": [2.0]}
SMALL |= {"fit_tokens": 4}
FIELDS: dict[str, Any] = {
    "name": "guided",
    "subject": "shapes-unet",
    "data": {"prompts": DATA},
    "pipeline": {"num_inference_steps": 2},
    "batch": {"rows": 8},  # the fit takes two batches
}


@pytest.fixture(scope="module")
def results(reader, tmp_path_factory) -> Results:
    folder = tmp_path_factory.mktemp("guide") / "run"
    metrics = ["pixel_distance", "detector"]
    return Experiment(reader=reader, metrics=metrics, method=METHOD, **FIELDS).run(folder)


@pytest.fixture
def edits(experiment, tmp_path) -> Callable[..., tuple[list[Any], list[Any]]]:
    """The edits of all rows as one batch, and the rows, after a run."""

    def made(data: Any = DATA, **changes: Any) -> tuple[list[Any], list[Any]]:
        found = experiment(data={"prompts": data}, method=SMALL | changes, batch={"rows": 48})
        found.run(tmp_path / "run")
        return found.spec.method.edits_of(found.job, found.job.rows), found.job.rows

    return made


def probe_of(results: Results) -> Probe:
    return Probe.load(guide_probes.probe_file(results.folder.path, 0))


def test_rows_conditions_and_their_columns(results) -> None:
    names = ("strength", "iterations")
    settings = {
        condition: list(
            dict.fromkeys(tuple(row[name] for name in names) for row in results.of(condition))
        )
        for condition in results.conditions
    }
    swept = [(0.0, 1), (0.0, 3), (STRONG, 1), (STRONG, 3)]
    assert settings == {
        "unedited": [(None, None)],
        "edited": swept,
        "random_probe": swept,
        "difference": [(0.0, None), (16.0, None)],
    }
    assert len(results.rows) == 2 * sum(map(len, settings.values()))
    assert {row["target"] for row in results.rows} == {"blue"}
    assert [row["was"] for row in results.of("unedited")] == ["red", "blue"]
    assert all(row["turned"] == (row["color"] == "blue") for row in results.rows)
    assert {row["base"] for row in results.rows} == {None, 0, 1}


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("row, avoid", [(0, ["color=red"]), (1, [])], ids=["red", "blue"])
def test_a_row_of_a_batch_is_what_the_probe_gives_alone(
    results, reader, iterations, row, avoid
) -> None:
    """A row that is blue already has nothing to avoid."""
    more: dict[str, Any] = {"iterations": iterations, "trust": 6.0}
    guidance = probe_of(results).guidance(["color=blue"], avoid or None, STRONG, **more)
    found = results.of("edited", strength=STRONG, iterations=iterations)[row]
    check_alone(results, found, reader, guidance)
    for condition in ("edited", "random_probe"):
        still = results.of(condition, strength=0.0, iterations=iterations)[row]
        assert still["pixel_distance"] < 1e-5


def test_the_difference_is_that_of_the_means_of_labels(results, reader) -> None:
    """Steering by it, as the run does, from the means of what the probes were fitted to."""
    fitted = results.spec.method.load_or_fit(_job(results, reader))
    contrast = fitted.contrast(UP, "color=blue")
    assert contrast.shape == (2, 96)
    with torch.inference_mode():
        cache = reader.run(
            [each["prompt"] for each in FIT],
            record=Record(UP, branch="cond"),
            seeds=[100_000] * len(FIT),
            **STEPS,
        ).cache[UP]
    means = cache.tensor.float().mean(2)  # [rows, steps, features]
    blue = torch.tensor([each["color"] == "blue" for each in FIT])
    expected = means[blue].mean(0) - means[~blue].mean(0)
    assert torch.allclose(contrast, expected, atol=1e-3 * float(expected.norm()))
    row = results.of("difference", strength=16.0)[0]
    check_alone(results, row, reader, Steer(UP, contrast, 16.0, branch="cond"))
    assert results.of("difference", strength=0.0)[0]["pixel_distance"] < 1e-5


def _job(results: Results, reader: Reader) -> Any:
    made = Experiment(reader=reader, metrics=[], method=METHOD, **FIELDS)
    made.job.use_folder(results.folder)
    return made.job


def test_a_random_probe_has_the_norms_of_the_probe_and_nothing_else(results, reader) -> None:
    fitted = results.spec.method.load_or_fit(_job(results, reader))
    own, random = (fitted.mlps([UP], each)[UP] for each in (False, True))
    assert own.labels == random.labels == tuple(f"color={each}" for each in COLORS)
    for name in ("weights", "biases"):
        for mine, drawn in zip(getattr(own, name), getattr(random, name), strict=True):
            assert drawn.norm() == pytest.approx(float(mine.norm()), rel=1e-5)
            assert float(torch.cosine_similarity(mine.flatten(), drawn.flatten(), 0)) < 0.9
    again = fitted.mlps([UP], True)[UP]
    assert all(torch.equal(a, b) for a, b in zip(random.weights, again.weights, strict=True))
    row = results.of("random_probe", strength=STRONG, iterations=3)[0]
    edit = ProbeGuidance(
        UP, random, ["color=blue"], ["color=red"], STRONG, iterations=3, trust=6.0, branch="cond"
    )
    check_alone(results, row, reader, edit)


def test_uniform_targets_are_the_labels_in_turn_and_never_avoided(edits) -> None:
    data = [
        {"prompt": f"a {color} ring", "was": color, "id": f"{n} {color}"}
        for n, color in enumerate(("red", "blue", "green", "red"))
    ]
    found, rows = edits(data, target={"color": "uniform"})
    towards = ["blue", "green", "red", "blue"]
    assert [row.axes["target"] for row in rows] == towards * 4
    guided, random, *differences = found
    for number, edit in enumerate((guided, random), 1):
        assert edit.target == [[f"color={each}"] for each in towards] * 4
        assert edit.avoid == [["color=red"], ["color=blue"], ["color=green"], ["color=red"]] * 4
        assert edit.alpha == [STRONG * (row // 4 == number) for row in range(16)]
    assert len(differences) == 3
    for label, edit in zip(("blue", "green", "red"), differences, strict=True):
        wanted = [row >= 12 and towards[row % 4] == label for row in range(16)]
        assert edit.alpha == [2.0 * each for each in wanted]
    vectors = [edit.direction[UP] for edit in differences]
    assert not torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[1], vectors[2])


def test_a_label_to_reach_is_not_avoided(edits) -> None:
    found, _ = edits([{"prompt": "a blue ring", "was": "blue"}, DATA[0]], controls=[])
    assert [edit.target for edit in found] == [[["color=blue"]] * 4]
    assert found[0].avoid == [[], ["color=red"]] * 2


@pytest.mark.parametrize(
    "chosen, count", [(4, 4), (10**6, 64), ([0, -1], 2)], ids=["few", "all", "ends"]
)
def test_probes_are_fitted_to_chosen_tokens(experiment, tmp_path, chosen, count) -> None:
    """So many random tokens of each activation, or certain ones."""
    method = SMALL | {"fit_tokens": chosen, "controls": []}
    results = experiment(data={"prompts": DATA}, method=method).run(tmp_path / "run")
    card = probe_of(results).card
    told = card.held_out["color"]["confusion"]  # tokens of three prompts in two steps
    assert card.pool == "token" and sum(map(sum, told)) == 3 * 2 * count


def test_two_attributes_at_once(edits) -> None:
    """Numbers are labels too; a difference of means for each."""
    fit = [
        each | {"corners": {"circle": 0, "square": 4, "star": 10}[each["shape"]]} for each in FIT
    ]
    data = [{"prompt": "a red circle", "was": "red", "corners": 0}]
    found, rows = edits(
        data,
        fit={"prompts": fit},
        labels={"color": "color", "shape": "shape", "corners": "corners"},
        target={"color": "blue", "shape": "star"},
        avoid={"color": "was", "corners": "corners"},
        sites=[UP, MIDDLE],
        probe=METHOD["probe"] | {"holdout": 5},
        controls=["difference"],
    )
    assert {row.axes["target"] for row in rows} == {"blue + star"}
    guided, *differences = found
    assert guided.target[1] == ["color=blue", "shape=star"]
    assert guided.avoid[1] == ["color=red", "corners=0"]
    assert list(guided.probe) == [MIDDLE, UP] == list(differences[0].direction)
    assert len(differences) == 2 and all(edit.alpha == [0, 0, 2.0] for edit in differences)


def test_moving_away_alone_has_no_target(experiment, tmp_path) -> None:
    """Nothing to compare a mean with, and no column for the detector to read."""
    method = SMALL | {"target": {}, "controls": ["difference"]}
    method["avoid"] = {"color": "source_color"}
    made = experiment(["pixel_distance", "detector"], data=RED_TO_GREEN, method=method)
    results = made.run(tmp_path / "run")
    assert results.conditions == ["unedited", "edited"]
    assert {row["target"] for row in results.rows} == {"green"}  # of the data, left alone
    assert results.mean("edited", "pixel_distance").value > 1e-3
    plain = experiment(data={"prompts": DATA}, method=method | {"avoid": {"color": "was"}})
    assert all("target" not in row.columns() for row in plain.job.rows)


def test_pairs_are_drawn_from_their_targets_too(experiment) -> None:
    pairs = [{"source": "a red ring", "target": "a blue ring", "was": "red"}]
    plan = experiment(data={"pairs": pairs}, method=SMALL).plan()
    assert plan.conditions == {
        **{"unedited": 1, "target_prompt": 1, "edited": 1, "random_probe": 1, "difference": 1}
    }
    without = experiment(data={"pairs": pairs}, method=SMALL | {"controls": []}).plan()
    assert without.conditions == {"unedited": 1, "edited": 1}


def test_summary_and_best_say_what_the_rows_say(results) -> None:
    page = page_of(results)
    name, label = "pixel_distance", results.rows[-1]["cell"]
    means = {
        (strength, inner): results.mean("edited", name, strength=strength, iterations=inner).value
        for strength in (0.0, STRONG)
        for inner in (1, 3)
    }
    best = max(means, key=lambda key: means[key])
    assert page.pictured_setting() == {"cell": label, "strength": best[0], "iterations": best[1]}
    at = {"strength": best[0], "iterations": best[1]}
    setting = f" ({label}, strength {best[0]:g}, {best[1]} inner steps)"
    heads = {
        "unedited": ("unedited", {}),
        "edited": (f"edited{setting}", at),
        "random_probe": (f"random probe{setting}", at),
        "difference": (f"difference ({label}, strength 16)", {"strength": 16.0}),
    }
    for line, (condition, (head, where)) in zip(page.summary(), heads.items(), strict=True):
        first = format_interval(results.mean(condition, name, **where))
        assert line.startswith(f"  {head}: pixel_distance {first}, ")
        assert f"frame {format_interval(results.mean(condition, 'frame', **where))}" in line
    shown = {each.label: float(each.value) for each in page.numbers()}
    assert list(shown) == [f"pixel distance, {n}" for n in ("edited", "random probe", "difference")]
    assert shown["pixel distance, edited"] == pytest.approx(means[best], rel=0.01)


def test_equals_are_decided_for_the_weaker_and_fewer(results) -> None:
    rows = [dict(row) | {"pixel_distance": 0.5} for row in results.rows]
    alike = Results(results.folder, results.spec, rows, results.metrics)
    shown = page_of(alike).pictured_setting()
    assert (shown["strength"], shown["iterations"]) == (0.0, 1)


def test_the_report_has_curves_and_cards(results) -> None:
    sections = page_of(results).sections()
    assert [each.title for each in sections[:3]] == ["Guidance", "Strength", "Inner steps"]
    assert sections[3:] == [probe_of(results).card.section()]
    curves = sections[1].blocks[0].items[0].series
    assert [each.name for each in curves] == [
        *("1 inner steps", "3 inner steps", "random probe", "difference")
    ]
    inner = page_of(results).pictured_setting()["iterations"]
    where = {"strength": STRONG, "iterations": inner}
    expected = results.mean("random_probe", "pixel_distance", **where).value
    assert curves[2].y[-1] == pytest.approx(expected)
    page = (results.folder.path / "report.html").read_text()
    assert "Inner steps" in page and "random probe" in page
    assert f"strength {STRONG}, iterations {inner}" in page
    gallery: Any = next(
        each for each in build(results).sections if each.title == "Pictures"
    ).blocks[0]
    for (label, pictures), condition in zip(gallery.rows, results.conditions, strict=True):
        shown = results.of(condition, **(where if condition in ("edited", "random_probe") else {}))
        assert label == condition.replace("_", " ")
        for picture, row in zip(pictures, shown, strict=False):
            assert picture.image.tobytes() == results.image(row).tobytes()


def test_the_measured_colours_are_compared_with_an_even_share(experiment, tmp_path) -> None:
    method = SMALL | {"target": {"color": "uniform"}, "avoid": {}, "controls": []}
    results = experiment(
        ["detector"], data={"prompts": DATA}, method=method | {"effect": None}
    ).run(tmp_path / "run")
    lines = page_of(results).summary()
    for line, condition in zip(lines, ("unedited", "edited"), strict=True):
        colors = [str(row["color"]) for row in results.of(condition)]
        variation = format_interval(variation_to_uniform(colors, COLORS))
        assert line.endswith(f"variation of color {variation}")
    assert "variation of color" in (tmp_path / "run" / "report.html").read_text()


def test_a_stopped_run_goes_on_without_fitting_twice(experiment, tmp_path, monkeypatch) -> None:
    fits: list[Any] = []
    real = guide_probes.ProbedLabels._fit

    def counted(*given: Any) -> None:
        fits.append(given)
        real(*given)

    monkeypatch.setattr(guide_probes.ProbedLabels, "_fit", counted)

    def run(name: str, left: float = math.inf) -> Results:
        method = SMALL | {"effect": "brightness"}
        made = experiment([Stopping(left)], data={"prompts": DATA}, method=method)
        return made.run(tmp_path / name)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", 1)
    assert len(fits) == 2
    ended = run("stopped")
    assert len(fits) == 2
    assert [dict(row) for row in ended.rows] == [dict(row) for row in whole.rows]
    files = sorted((tmp_path / "whole" / "artifacts").glob("*.*"))
    assert [file.name for file in files] == ["differences.safetensors", "probe-0.safetensors"]
    for file in files:
        assert file.read_bytes() == (tmp_path / "stopped" / "artifacts" / file.name).read_bytes()


@pytest.mark.parametrize(
    "row", [{"color": "red"}, {"prompt": "a green ring"}], ids=["label", "text"]
)
def test_what_the_probes_are_fitted_to_is_part_of_the_fingerprint(experiment, row) -> None:
    plain, other = (
        experiment(method=METHOD | {"fit": {"prompts": prompts}}).job
        for prompts in (FIT, [FIT[0] | row, *FIT[1:]])
    )
    digests = [job.spec.method.inputs(job)["fit"] for job in (plain, other)]
    assert len(digests[0]) == 64 and digests[0] != digests[1]
    same = experiment(method=METHOD).job
    assert same.spec.method.inputs(same)["fit"] == digests[0]


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"target": {}, "avoid": {}}, "give labels as target, as avoid, or as both"),
        ({"target": {"size": "small"}}, r"size is no attribute of labels \(color\)"),
        ({"avoid": {"size": "was"}}, r"size is no attribute of labels \(color\)"),
        ({"labels": {}}, "method.labels: "),
        ({"target": {"color": "blu"}}, "unknown method.target.color 'blu'; nearest: blue"),
        ({"avoid": {"color": "is"}}, "method.avoid.color: is of entry 'circle' 'None'; nearest"),
        ({"avoid": {"color": "id"}}, "method.avoid.color: id of entry 'circle' 'None'; nearest"),
        ({"labels": {"color": "hue"}}, "method.labels.color: entry '0' of method.fit has no value "
         "in the column hue; it has color, shape"),
        ({"fit": {"prompts": [{"prompt": "a", "color": "a + b"}]}},
         "entry '0' of method.fit: 'a [+] b' holds ' [+] ', which joins labels"),
        ({"fit": {"prompts": [{"prompt": "a", "color": None}]}}, "no value in the column color"),
        ({"strengths": []}, "method.strengths: "),
        ({"iterations": [0]}, "method.iterations.0: "),
        ({"trust": -1}, "method.trust: "),
    ],
    ids=["none", "target", "avoid", "labels", "label", "column", "id", "fit", "joined", "null",
         "strengths", "iterations", "trust"],
)  # fmt: skip
def test_what_cannot_be_guided(experiment, changes, text) -> None:
    with pytest.raises((InvalidInput, LookupError), match=text):
        experiment(data={"prompts": DATA}, method=SMALL | changes).plan()


def test_a_target_in_the_data_must_be_that_of_the_method(experiment) -> None:
    method = SMALL | {"avoid": {}}
    text = "entry '0' of data has the target 'green', the method moves it to 'blue'"
    with pytest.raises(InvalidInput, match=text):
        experiment(data=RED_TO_GREEN, method=method).plan()
    rows = experiment(data=RED_TO_GREEN, method=method | {"target": {"color": "green"}}).job.rows
    assert {row.columns()["target"] for row in rows} == {"green"}


def test_cells_of_one_probe_have_the_same_tokens(experiment, tmp_path) -> None:
    text = r"at different tokens \(0, 1\); a probe is fitted to one selection, write a spec for"
    with pytest.raises(InvalidInput, match=text):
        experiment(data={"prompts": DATA}, method=SMALL | {"tokens": [0, 1]}).run(tmp_path / "run")


def test_a_language_model_is_guided_at_its_last_token(language, tmp_path) -> None:
    fit = [
        {"prompt": f"{start} {end}", "animal": end}
        for start in ("a", "a red", "the", "the red", "a blue", "the blue")
        for end in ("cat", "dog")
    ]
    rows = [
        {"prompt": "the house", "answer": 40, "plain_text": "a red cat on a tree"},
        {"prompt": "a tree on a house", "answer": 41, "plain_text": "the dog"},
    ]
    layer = "transformer.h.1"
    made = Experiment(
        name="animals",
        reader=language,
        data={"prompts": rows},
        method={
            "kind": "guide",
            "sites": layer,
            "tokens": -1,
            "fit": {"prompts": fit},
            "labels": {"animal": "animal"},
            "probe": PROBE | {"hidden": [], "controls": False},
            "target": {"animal": "uniform"},
            "strengths": [2.0],
            "iterations": [2],
            "difference_strengths": [1.0],
        },
        metrics=["probability", "perplexity"],
        batch={"rows": 5},
    )
    results = made.run(tmp_path / "run")
    assert [row["target"] for row in results.of("edited")] == ["cat", "dog"]
    probe = probe_of(results)
    for row, text in zip(results.of("edited"), rows, strict=True):
        guidance = probe.guidance(
            [f"animal={row['target']}"], None, 2.0, iterations=2, tokens=-1, site=layer
        )
        last = language.run(text["prompt"], edits=guidance).output.logits[0, -1].softmax(0)
        assert row["probability"] == pytest.approx(float(last[text["answer"]]), rel=1e-3)
        base = results.rows[row["base"]]
        assert abs(row["probability"] / base["probability"] - 1) > 0.01
        # the last token of the text is moved, whose own prediction is not asked for
        assert row["perplexity"] == pytest.approx(base["perplexity"], rel=1e-5)
