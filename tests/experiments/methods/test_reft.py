"""Learned edits in experiments: adapters of `dreamreader.reft`, their sweep and their controls."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dreamreader.edits import Steer
from dreamreader.errors import InvalidInput
from dreamreader.experiments import Experiment, load_results
from dreamreader.experiments.methods import reft_adapters
from dreamreader.experiments.pages import page_of
from dreamreader.experiments.results import Results, format_interval
from dreamreader.reft import Reft, record_pairs

from ..conftest import MIDDLE, PAIRS
from .alone import STEPS, Stopping, check_alone

UP = "unet.up_blocks.2.attentions.0.transformer_blocks.0.attn2"
SITES = [MIDDLE, UP]
STRONG = 12.0  # turns the picture enough to tell one direction from its opposite
SHAPES = ("star", "ring", "cross")
FIT = [{"source": f"a red {s}", "target": f"a blue {s}"} for s in SHAPES]
METHOD: dict[str, Any] = {
    "kind": "reft",
    "sites": SITES,
    "group": "all",
    "fit": {"pairs": FIT},
    "fit_seeds": [7],
    "variants": ["loreft", "bias"],
    "ranks": [1, 2],
    "strengths": [0.0, STRONG],
    "training": {"steps": 6, "lr": 0.1, "batch_size": 4, "validation": 0.3, "validate_every": 2},
    "effect": "pixel_distance",
}
SMALL = METHOD | {"sites": UP, "variants": ["loreft"], "ranks": [2], "strengths": [STRONG]}
KEYS = [
    *(("edited", "loreft", 1), ("edited", "loreft", 2), ("edited", "bias", 0)),
    ("untrained", "loreft", 1),
]
"""Condition, variant and rank of every adapter of METHOD, in the order of their files."""
FIELDS: dict[str, Any] = {
    "name": "learned",
    "subject": "shapes-unet",
    "data": {"pairs": PAIRS},
    "pipeline": {"num_inference_steps": 2},
    "batch": {"rows": 24},
}


@pytest.fixture(scope="module")
def made(reader, tmp_path_factory) -> Experiment:
    folder = tmp_path_factory.mktemp("reft") / "run"
    found = Experiment(reader=reader, metrics=["pixel_distance"], method=METHOD, **FIELDS)
    found.run(folder)
    return found


@pytest.fixture(scope="module")
def results(made) -> Results:
    return load_results(made.job.folder.path)


def adapters(results: Results, *key: Any) -> Reft:
    number = KEYS.index(key)
    return Reft.load(results.folder.path / "artifacts" / f"adapter-{number}.safetensors")


def test_rows_conditions_and_their_columns(results) -> None:
    assert results.conditions == ["unedited", "target_prompt", "edited", "untrained", "difference"]
    names = ("variant", "rank", "strength", "cell")
    settings = {
        condition: list(
            dict.fromkeys(tuple(row[name] for name in names) for row in results.of(condition))
        )
        for condition in results.conditions
    }
    places = [(strength, results.rows[-1]["cell"]) for strength in (0.0, STRONG)]
    kinds = [("loreft", 1), ("loreft", 2), ("bias", 0)]
    assert settings == {
        "unedited": [(None, None, None, None)],
        "target_prompt": [(None, None, None, None)],
        "edited": [(*kind, *place) for kind in kinds for place in places],
        "untrained": [("loreft", 1, *place) for place in places],
        "difference": [(None, None, *place) for place in places],
    }
    assert len(results.rows) == 2 * sum(map(len, settings.values()))
    assert [row["prompt"] for row in results.of("target_prompt")] == [p["target"] for p in PAIRS]
    assert {row["base"] for row in results.rows} == {None, 0, 1}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key[0]}-{key[1]}-{key[2]}")
def test_a_row_of_a_batch_is_what_its_adapter_gives_alone(results, reader, key) -> None:
    condition, variant, rank = key
    where = {"variant": variant, "rank": rank, "item": "square"}
    row = results.of(condition, strength=STRONG, **where)[0]
    check_alone(results, row, reader, adapters(results, *key).edits(STRONG, branch="cond"))
    assert results.of(condition, strength=0.0, **where)[0]["pixel_distance"] < 1e-5


def test_the_difference_is_that_of_the_means_of_the_pairs(results, reader) -> None:
    steps = {name: value for name, value in STEPS.items() if name != "output_type"}
    sources, targets = ([pair[name] for pair in FIT] for name in ("source", "target"))
    pairs = record_pairs(reader, sources, targets, SITES, seeds=[7] * 3, branch="cond", **steps)
    vectors = {  # [steps, width]
        site: (pairs.teacher[site] - pairs.base[site]).float().mean((0, 2)) for site in SITES
    }
    row = results.of("difference", strength=STRONG, item="square")[0]
    check_alone(results, row, reader, Steer(SITES, vectors, STRONG, branch="cond"))


def test_only_the_adapters_of_the_condition_edited_are_trained(results, made) -> None:
    for key in KEYS:
        condition, variant, rank = key
        found = adapters(results, *key)
        assert (list(found.sites), found.variant) == (SITES, variant)
        init = "pyreft" if condition == "untrained" else "identity"
        fresh = Reft.for_sites(made.job.reader, SITES, max(rank, 1), variant, init=init)
        pairs = zip(found.parameters(), fresh.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == (condition == "untrained"), key
    notes = sorted((results.folder.path / "artifacts").glob("adapter-*.json"))
    trained = [json.loads(file.read_text()) for file in notes]
    assert [(each["variant"], each["rank"]) for each in trained] == [key[1:] for key in KEYS[:3]]
    assert all(each["steps"] == 6 and len(each["validation"]) >= 3 for each in trained)
    found = adapters(results, *KEYS[1])
    assert trained[1]["parameters"] == sum(each.numel() for each in found.parameters())


def test_summary_numbers_and_best_say_what_the_rows_say(results) -> None:
    page = page_of(results)
    names = ("variant", "rank", "cell", "strength")
    means = dict.fromkeys((tuple(row[n] for n in names) for row in results.of("edited")), 0.0)
    for key in means:
        where = dict(zip(names, key, strict=True))
        means[key] = results.mean("edited", "pixel_distance", **where).value
    best = max(means, key=lambda key: means[key])
    assert tuple(page.pictured_setting().values()) == best and best[3] == STRONG
    lines = page.summary()
    assert [line.split("(")[0].split(":")[0].strip() for line in lines] == [
        *("unedited", "target prompt", "loreft", "bias", "untrained", "difference of means")
    ]
    loreft = max((key for key in means if key[0] == "loreft"), key=lambda key: means[key])
    where = dict(zip(names, loreft, strict=True))
    value = format_interval(results.mean("edited", "pixel_distance", **where))
    assert (
        lines[2] == f"  loreft (rank {loreft[1]}, {loreft[2]}, strength 12): pixel_distance {value}"
    )
    control = format_interval(
        results.mean("untrained", "pixel_distance", cell=best[2], strength=STRONG)
    )
    assert lines[4].endswith(f"(rank 1, {best[2]}, strength 12): pixel_distance {control}")
    shown = {each.label: float(each.value) for each in page.numbers()}
    assert list(shown) == [
        f"pixel distance, {name}" for name in ("loreft", "bias", "untrained", "difference of means")
    ]
    assert shown["pixel distance, loreft"] == pytest.approx(means[loreft], rel=0.01)


def test_the_report_has_curves_settings_and_training(results) -> None:
    sections = {section.title: section for section in page_of(results).sections()}
    assert list(sections) == ["Learned edits", "Strength", "Rank", "Every setting", "Training"]
    settings = sections["Every setting"].blocks[0].rows
    assert len(settings) == 6 + 2 + 2 == len({row[:5] for row in settings})
    trained = sections["Training"].blocks[0].rows
    assert [row[1:3] for row in trained] == [("loreft", 1), ("loreft", 2), ("bias", "")]
    assert all(float(row[6]) <= float(row[5]) for row in trained)
    best = page_of(results).pictured_setting()
    page = (results.folder.path / "report.html").read_text()
    assert "Learned edits" in page and "difference of means" in page
    assert f"Changed rows: variant {best['variant']}, rank {best['rank']}" in page


def test_equals_are_decided_for_the_weaker_and_smaller(results) -> None:
    rows = [dict(row) | {"pixel_distance": 0.5} for row in results.rows]
    alike = Results(results.folder, results.spec, rows, results.metrics)
    shown = page_of(alike).pictured_setting()
    assert (shown["rank"], shown["strength"]) == (0, 0.0) and shown["variant"] == "bias"


def test_a_stopped_run_goes_on_without_training_twice(
    experiment, reader, tmp_path, monkeypatch
) -> None:
    trained: list[Reft] = []
    real = reft_adapters.train

    def counted(reft: Reft, *given: Any, **more: Any) -> Any:
        trained.append(reft)
        return real(reft, *given, **more)

    monkeypatch.setattr(reft_adapters, "train", counted)

    def run(name: str, left: float = math.inf) -> Any:
        method = SMALL | {"effect": "brightness", "variants": ["loreft", "direft"]}
        method |= {"fit": {"pairs": FIT[:2]}}
        metrics = [Stopping(left)]
        made = experiment(metrics, data={"pairs": PAIRS[:1]}, method=method, batch={"rows": 2})
        return made.run(tmp_path / name)

    whole = run("whole")
    assert len(trained) == 2
    with pytest.raises(KeyboardInterrupt):
        run("stopped", 1)
    assert len(trained) == 4
    lost = tmp_path / "stopped" / "artifacts" / "adapter-1.safetensors"
    before = lost.read_bytes()
    lost.unlink()
    ended = run("stopped")
    assert len(trained) == 5 and lost.read_bytes() == before
    assert [dict(row) for row in ended.rows] == [dict(row) for row in whole.rows]
    files = sorted((tmp_path / "whole" / "artifacts").glob("*.*"))
    assert len(files) == 3 + 2 + 1
    for file in files:
        assert file.read_bytes() == (tmp_path / "stopped" / "artifacts" / file.name).read_bytes()


def test_only_what_is_asked_for_is_made(experiment, tmp_path) -> None:
    method = SMALL | {"controls": []}
    results = experiment(data={"pairs": PAIRS}, method=method).run(tmp_path / "run")
    assert results.conditions == ["unedited", "edited"]
    files = {file.name for file in (tmp_path / "run" / "artifacts").glob("*.*")}
    assert files == {"adapter-0.safetensors", "adapter-0.json"}


def test_sets_of_sites_with_adapters_of_each_step_in_a_window(experiment, reader, tmp_path) -> None:
    training = METHOD["training"] | {"per_step": True}
    method = SMALL | {"windows": [[1, 2]], "training": training, "controls": ["untrained"]}
    method |= {"sites": SITES, "group": {"one site": UP, "two sites": SITES}}
    results = experiment(data={"pairs": PAIRS}, method=method, batch={"rows": 10}).run(
        tmp_path / "run"
    )
    cells = list(dict.fromkeys(row["cell"] for row in results.of("edited")))
    assert cells == ["one site · step 1", "two sites · step 1"]
    for number, (cell, sites) in enumerate(zip(cells, ([UP], SITES), strict=True)):
        file = tmp_path / "run" / "artifacts" / f"adapter-{number}.safetensors"
        reft = Reft.load(file)
        assert reft.steps == 2 and list(reft.sites) == sites
        row = results.of("edited", cell=cell, item="square")[0]
        check_alone(results, row, reader, reft.edits(STRONG, branch="cond", steps=1))


@pytest.mark.parametrize("which", ["fit", "keep"])
def test_the_prompts_of_the_training_are_part_of_the_fingerprint(
    experiment, tmp_path, which
) -> None:
    path = tmp_path / "pairs.jsonl"
    data = {"file": str(path)}
    method = SMALL | {"controls": [], "training": dict(METHOD["training"])}
    if which == "fit":
        method["fit"] = data
    else:
        method["training"]["keep"] = {"data": data}
    path.write_text('{"source": "a red star", "target": "a blue star"}\n' * 3)
    experiment(data={"pairs": PAIRS}, method=method).run(tmp_path / "run")
    path.write_text('{"source": "a red star", "target": "a green star"}\n' * 3)
    if which == "keep":
        path.write_text('{"source": "a gray star"}\n' * 3)
    with pytest.raises(InvalidInput, match=r"holds another run: settings.inputs.fit was "):
        experiment(data={"pairs": PAIRS}, method=method).run(tmp_path / "run")


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"training": {"loss": "denoising"}}, "denoising needs pictures; use `dreamreader reft tr"),
        (
            {"training": {"loss": "language"}},
            "method.fit: the loss language needs a column completion with text",
        ),
        (
            {"fit": {"prompts": ["a"]}},
            "method.fit, for the loss activations: entry '0' has no target",
        ),
        ({"tokens": [0, 1]}, r"at different tokens \(0, 1\); adapters are trained for one"),
        ({"ranks": [2, 97]}, "rank 97: from 1 to the width, 96, is possible"),
        ({"variants": ["lorft"]}, "method.variants.0: "),
        ({"variants": []}, "method.variants: "),
        ({"sites": "unet.middle"}, "unknown site 'unet.middle'"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_learned(experiment, tmp_path, changes, text) -> None:
    with pytest.raises((InvalidInput, LookupError), match=text):
        experiment(data={"pairs": PAIRS}, method=SMALL | changes).run(tmp_path / "run")


def test_a_rank_that_is_too_large_is_refused_before_anything_is_trained(
    experiment, tmp_path
) -> None:
    with pytest.raises(InvalidInput, match="rank 97"):
        experiment(data={"pairs": PAIRS}, method=SMALL | {"ranks": [2, 97]}).run(tmp_path / "run")
    assert not list((tmp_path / "run" / "artifacts").glob("adapter*"))


@pytest.fixture
def spoken(language, tmp_path) -> Callable[..., Results]:
    def run(method: dict[str, Any], **changes: Any) -> Results:
        fields: dict[str, Any] = {
            "name": "spoken",
            "data": {
                "prompts": [
                    {"prompt": "a red cat", "answer": 40, "plain_text": "the house by the tree"},
                    {"prompt": "the dog", "answer": 41, "plain_text": "a blue cat"},
                ]
            },
            "metrics": ["probability", "perplexity"],
            "batch": {"rows": 3},
        }
        base = {"kind": "reft", "sites": "transformer.h.1", "ranks": [2], "strengths": [1.0]}
        return Experiment(reader=language, method=base | method, **fields | changes).run(
            tmp_path / "run"
        )

    return run


def test_a_language_model_learns_completions(spoken, language) -> None:
    """The trained one predicts what it was trained on; there are no pairs to take means of."""
    text = "a red cat on a red tree"
    prompts = [{"prompt": "a red cat", "answer": 40, "plain_text": text}]
    fit = [
        {"prompt": f"a red {each}", "completion": " on a red tree"} for each in ("cat", "dog", "a")
    ]
    training = {"loss": "language", "steps": 30, "lr": 0.05, "validation": 0}
    results = spoken({"fit": {"prompts": fit}, "training": training}, data={"prompts": prompts})
    assert results.conditions == ["unedited", "edited", "untrained"]
    base, found = (results.of(name)[0]["perplexity"] for name in ("unedited", "edited"))
    assert found < base / 3
    reft = Reft.load(results.folder.path / "artifacts" / "adapter-0.safetensors")
    ids = language.tokenizer(text, return_tensors="pt").input_ids
    logits = language.run(text, edits=reft.edits()).output.logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert found == pytest.approx(float(loss.exp()), rel=1e-4)
    assert "variation" not in (results.folder.path / "report.html").read_text()


def test_a_language_model_matches_activations_beside_their_difference(spoken, language) -> None:
    pairs = [{"source": f"a red {each}", "target": f"a blue {each}"} for each in ("cat", "dog")]
    training = {"steps": 5, "validation": 0}
    results = spoken({"fit": {"pairs": pairs}, "tokens": -1, "training": training})
    assert results.conditions == ["unedited", "edited", "untrained", "difference"]
    ends = {}
    for name in ("source", "target"):
        found = [
            language.run(pair[name], record="transformer.h.1").cache["transformer.h.1"].tensor
            for pair in pairs
        ]
        ends[name] = torch.stack([each.reshape(-1, each.shape[-1])[-1] for each in found])
    shift = (ends["target"] - ends["source"]).mean(0)
    edit = Steer("transformer.h.1", shift, 1.0, tokens=-1)
    for row, number in zip(results.of("difference"), (40, 41), strict=True):
        logits = language.run(row["prompt"], edits=edit).output.logits[0, -1]
        assert row["probability"] == pytest.approx(float(logits.softmax(0)[number]), rel=1e-3)


def test_losses_of_pipelines_are_not_for_texts(spoken) -> None:
    pairs = [{"source": "a red cat", "target": "a blue cat"}]
    method = {"fit": {"pairs": pairs}, "training": {"loss": "noise"}}
    with pytest.raises(InvalidInput, match=re.escape("noise is for pipelines, not for texts")):
        spoken(method)
