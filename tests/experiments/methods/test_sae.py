"""Latents in experiments are changed as `SAEEdit` changes them."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import dreamreader as dr
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments.methods.sae_choice import FeatureSet, LatentChoice, LatentMeans
from dreamreader.experiments.methods.sae_trials import Trials
from dreamreader.experiments.pages import page_of
from dreamreader.metrics.detector import attributes, detect
from dreamreader.sae import SAEEdit, SparseAutoencoder, TopK
from dreamreader.specs.data import Item, scene_items
from dreamreader.specs.parts import Scenes
from dreamreader.steering import LabelMeans
from dreamreader.training.sae import SaeJob

from ..conftest import PAIRS
from .test_patch import SITES, STEPS, Blueness, blueness

SITE = SITES[0]
FIT, TRIAL, TEST = {"count": 24}, {"count": 12, "skip": 24}, {"count": 4, "skip": 36}
CHOOSE = {
    "label": "source_color",
    "targets": ["blue", "green"],
    "fit": {"scenes": FIT},
    "trial": {"scenes": TRIAL},
    "trial_rows": 2,
    "candidates": 2,
    "sizes": [1, 4],
}


@pytest.fixture(scope="module")
def common_file(reader, tmp_path_factory) -> str:
    found = reader.run(PAIRS[0]["source"], record=SITE, seeds=[5], **STEPS)
    width = found.cache[SITE].shape[-1]
    sae = SparseAutoencoder(width, 24, TopK(3), seed=2)
    sae.statistics["frequency"] = torch.linspace(0.01, 0.5, 24)
    path = tmp_path_factory.mktemp("autoencoder") / "sae.safetensors"
    sae.save(path)
    return str(path)


@pytest.fixture
def file(common_file: str, tmp_path: Path) -> str:
    """A copy, which a test may change."""
    return str(shutil.copy(common_file, tmp_path))


def method(file: str, **changes) -> dict:
    own = {"kind": "sae", "autoencoder": {"file": file}, "sites": SITE, "features": [3, 7]}
    return own | {"strengths": [2.0, 6.0], "branch": "cond"} | changes


def test_rows_are_those_of_edits_by_hand(experiment, reader, tmp_path, file) -> None:
    results = experiment(
        metrics=[Blueness()],
        data={"prompts": [PAIRS[0]["source"]]},
        seeds=[5],
        method=method(file),
        batch={"rows": 5},
    ).run(tmp_path / "run")
    sae = SparseAutoencoder.load(file)
    for row in results.of("edited"):
        edit = SAEEdit(SITE, sae, int(row["features"]), "set", row["strength"], branch="cond")
        want = blueness(reader.run(PAIRS[0]["source"], edits=edit, seeds=[5], **STEPS))
        assert row["blueness"] == pytest.approx(float(want[0]), abs=1e-4)
    assert len(results.of("edited")) == len(results.of("random_features")) == 4
    values = [row["blueness"] for row in results.rows]
    assert len(set(values)) > 4  # settings differ


def test_random_latents_have_about_the_same_frequency(experiment, tmp_path, file) -> None:
    made = experiment(method=method(file, features={"pair": [3, 4]}))
    sets = {"pair": FeatureSet((3, 4), (0.5, 2.0))}
    own = made.spec.method.random_sets(sets)
    assert set(own) == {"pair"} and own["pair"].levels == (0.5, 2.0)
    drawn = own["pair"].features
    assert len(set(drawn)) == 2 and not {3, 4} & set(drawn)
    assert all(abs(each - 3.5) < 20 for each in drawn)
    assert made.spec.method.random_sets(sets) == own


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(features=[99]), "latent 99 of 99 is none of 24"),
        (dict(autoencoder={"file": "nothing.safetensors"}), "method.autoencoder: .*nothing"),
    ],
)
def test_what_cannot_be_run_is_refused(experiment, tmp_path, file, changes, text) -> None:
    with pytest.raises(InvalidInput, match=text):
        experiment(method=method(file, **changes)).run(tmp_path / "run")


def test_without_frequencies_there_is_no_random_control(experiment, tmp_path, file) -> None:
    sae = SparseAutoencoder.load(file)
    sae.statistics.clear()
    sae.save(file)
    with pytest.raises(InvalidInput, match="does not say how often its latents are active"):
        experiment(method=method(file)).run(tmp_path / "run")
    with pytest.raises(InvalidInput, match=r"features.none: is empty"):
        experiment(method=method(file, features={"none": []}))
    assert dr.load_artifact(file).d_sae == 24


def test_a_value_of_zero_switches_off(experiment, reader, tmp_path, file) -> None:
    results = experiment(
        metrics=[Blueness()],
        data={"prompts": [PAIRS[0]["source"]]},
        seeds=[5],
        method=method(file, op="scale", strengths=[0.0], features={"all": list(range(24))})
        | {"controls": []},
        batch={"rows": 2},
    ).run(tmp_path / "run")
    edit = SAEEdit(SITE, SparseAutoencoder.load(file), range(24), "scale", 0.0, branch="cond")
    want = blueness(reader.run(PAIRS[0]["source"], edits=edit, seeds=[5], **STEPS))
    (row,), (plain,) = results.of("edited"), results.of("unedited")
    assert row["blueness"] == pytest.approx(float(want[0]), abs=1e-4)
    assert abs(row["blueness"] - plain["blueness"]) > 1e-4


@pytest.fixture(scope="module")
def choosing(experiment, common_file):
    """An experiment that chooses latents for two colours."""

    def made(choose=(), **changes):
        own = method(common_file, features=None, choose=CHOOSE | dict(choose), strengths=[1.0, 3.0])
        return experiment(
            metrics=["detector", "pixel_distance"],
            data={"scenes": TEST},
            seeds=[5],
            pipeline={"num_inference_steps": 2},
            batch={"rows": 16},
            method=own | {"difference_strengths": [2.0]} | changes,
        )

    return made


@pytest.fixture(scope="module")
def chosen(choosing, tmp_path_factory):
    """The experiment when it has run, and what it gave."""
    made = choosing()
    return made, made.run(tmp_path_factory.mktemp("chosen") / "run")


def test_codes_are_averaged_by_label(chosen, reader, common_file) -> None:
    made, _ = chosen
    file, means = common_file, made.job.memory["means"]
    sae, items = SparseAutoencoder.load(file), list(scene_items(Scenes(**FIT)))
    found = reader.run(
        [item.prompt for item in items],
        record=dr.Record(SITE, branch="cond"),
        seeds=[100_000] * len(items),
        progress=False,
        **dr.zoo.settings(num_inference_steps=2),
    )
    x = found.cache[SITE].tensor.flatten(1, 2)  # [rows, values, d_in]
    codes = sae.encode(x).detach()
    colours = [item.columns["source_color"] for item in items]
    blue = torch.tensor([each == "blue" for each in colours])
    wanted = LabelMeans()
    wanted.add({"codes": codes.mean(1, keepdim=True)}, colours)
    n = means.labels.index("blue")
    torch.testing.assert_close(means.contrasts[n], wanted.contrast("codes", "blue")[0])
    own, active = codes[blue].flatten(0, 1), (codes[blue] > 0).flatten(0, 1)
    level = own.sum(0) / active.sum(0).clamp(min=1)
    torch.testing.assert_close(means.levels[n], level, rtol=1e-4, atol=1e-4)
    rest = [each for each in means.labels if each != "blue"]
    others = torch.stack(
        [x[torch.tensor([c == each for c in colours])].flatten(0, 1).mean(0) for each in rest]
    )
    want = x[blue].flatten(0, 1).mean(0) - others.mean(0)
    torch.testing.assert_close(means.differences[n], want, rtol=1e-4, atol=1e-4)
    order = means.contrasts[n].argsort(descending=True).tolist()
    assert [each.features[0] for each in means.candidates("blue", 2)] == order[:2]
    both = means.by_contrast("blue", 6, True)
    assert set(both.features) == set(means.contrasts[n].abs().argsort().tolist()[-6:])
    off = [level == 0 for level in both.levels]
    assert off == [bool(means.contrasts[n, j] <= 0) for j in both.features] and any(off)


def test_trials_are_edits_by_hand_and_the_best_is_kept(chosen, reader, common_file) -> None:
    made, _ = chosen
    folder = made.job.folder
    sae, settings = SparseAutoencoder.load(common_file), dr.zoo.settings(num_inference_steps=2)
    for label, own in folder.need("choice.json")["labels"].items():
        tried = own["tried"]
        assert len(tried) == 4 and {each["strength"] for each in tried} == {1.0, 3.0}
        best = max(tried, key=lambda t: (t["succeeded"], t["reached"] + t["kept"], -t["strength"]))
        single = own["sets"][f"{label}, one"]
        assert {name: single[name] for name in best} == best
        assert 1 <= len(own["sets"][f"{label}, up to 4"]["features"]) <= 4
        items = [i for i in scene_items(Scenes(**TRIAL)) if i.columns["source_color"] != label][:2]
        rows = {"seeds": [200_000] * 2, "progress": False, "output_type": "pt", **settings}
        value = [each * best["strength"] for each in best["levels"]]
        edit = SAEEdit(SITE, sae, best["features"], "set", value, branch="cond")
        prompts = [item.prompt for item in items]
        plain, changed = (
            [attributes(each) for each in detect(reader.run(prompts, edits=e, **rows).images)]
            for e in ([], edit)
        )
        assert best["reached"] == sum(each["color"] == label for each in changed) / 2
        rest = ("shape", "size", "place", "background", "frame", "objects")
        pairs = list(zip(plain, changed, strict=True))
        kept = [a["objects"] > 0 and all(a[n] == b[n] for n in rest) for a, b in pairs]
        assert best["kept"] == sum(kept) / 2


def test_chosen_latents_are_measured_on_other_pictures(chosen) -> None:
    made, results = chosen
    colours = {item.id: item.columns["source_color"] for item in made.job.items}
    for condition in ("edited", "random_features", "difference"):
        rows = results.of(condition)
        assert rows and all(colours[row["item"]] != row["target"] for row in rows)
    shown = page_of(results).chosen
    for found in shown.findings():
        edit = next(e for e in shown.edits if (e.label, e.kind) == (found["label"], found["edit"]))
        own = results.of(edit.condition, features=edit.name, strength=edit.strength)
        success = [row["turned"] and row["others_kept"] for row in own]
        assert found["success"]["n"] == len(own) > 0
        assert found["success"]["value"] == pytest.approx(sum(success) / len(own))
        assert (found["trial"] is None) == (edit.condition == "random_features")
    assert [each.kind for each in shown.edits[:5]] == [
        *("one latent", "up to 4 latents"),
        *("one latent, random", "up to 4 latents, random", "difference of means"),
    ]
    text = "\n".join(made.summary(results.folder))
    assert "up to 4 latents, random: success" in text and "blue: one latent " in text
    assert "Success against distance" in (made.job.folder.path / "report.html").read_text()


def test_what_was_chosen_is_not_chosen_again(choosing, chosen, tmp_path, monkeypatch) -> None:
    _, whole = chosen
    real, labels = Trials.choose, []

    def stopped(self, means, label, strengths):
        labels.append(label)
        if labels == ["blue", "green"]:
            raise KeyboardInterrupt
        return real(self, means, label, strengths)

    monkeypatch.setattr(Trials, "choose", stopped)
    with pytest.raises(KeyboardInterrupt):
        choosing().run(tmp_path / "run")
    found = choosing().run(tmp_path / "run")
    assert labels == ["blue", "green", "green"]
    assert [row["digest"] for row in found.rows] == [row["digest"] for row in whole.rows]


def test_rounds_change_a_set_in_one_thing_while_it_does_more(
    choosing, tmp_path, monkeypatch
) -> None:
    real, ran = Trials.run, {}

    def watched(self, label, *arguments):
        ran.setdefault(label, []).append(real(self, label, *arguments))
        return ran[label][-1]

    monkeypatch.setattr(Trials, "run", watched)
    made = choosing({"rounds": 1, "sizes": [2], "targets": ["blue"]}, strengths=[3.0])
    made.run(tmp_path / "run")
    for label, own in made.job.folder.need("choice.json")["labels"].items():
        _, proposed, *rounds, _ = ran[label]  # single ones before, the difference behind
        assert 1 <= len(rounds) <= 3  # of each of three sets
        best = max(
            (each for trials in (proposed, *rounds) for each in trials), key=lambda t: t.order
        )
        kept = own["sets"][f"{label}, up to 2"]
        assert (
            tuple(kept["features"]) == best.latents.features and kept["succeeded"] == best.succeeded
        )
        before = max(proposed, key=lambda each: each.order).latents
        for each in rounds[0]:
            assert len(set(each.latents.features) ^ set(before.features)) <= 1
            assert each.strength == rounds[0][0].strength


def test_neighbours_of_a_set_differ_in_one_thing() -> None:
    contrasts = torch.tensor([[0.0, 3.0, 2.0, -1.0, 0.0], [0.0, -1.0, 0.0, 5.0, 1.0]])
    means = LatentMeans(("blue", "red"), contrasts, contrasts.abs() + 1, contrasts)
    own = FeatureSet((1, 3), (4.0, 0.0), (3,))
    near = means.neighbours(own, "blue", ["red"], 3, 2)
    assert all(each.where == (3,) for each in near)
    assert [(each.features, each.levels) for each in near] == [
        ((1, 3, 4), (4.0, 0.0, 0.0)),
        ((1, 3, 2), (4.0, 0.0, 3.0)),
        ((3,), (0.0,)),
        ((1,), (4.0,)),
        ((1, 3), (3.4, 0.0)),
        ((1, 3), (4.8, 0.0)),
    ]
    full = means.neighbours(own, "blue", ["red"], 2, 2)
    assert full == near[2:]  # there is no room for another one
    assert means.neighbours(own, "blue", (), 2, 2, ()) == near[2:4]  # levels play no part
    pair = means.neighbours(FeatureSet((1, 2), (4.0, 2.0)), "blue", ["red"], 2, 2)
    assert [each.levels for each in pair[-2:]] == [(3.4, 1.7), (4.8, 2.4)]


def test_to_remove_a_label_only_its_own_pictures_are_changed(choosing, tmp_path) -> None:
    made = choosing({"goal": "remove", "targets": ["red"], "sizes": [2]}, op="ablate")
    made.spec.method.strengths[:] = [1.0]
    rows = [row for row in made.job.rows if row.condition != "unedited"]
    assert all(row.item.columns["source_color"] == row.axes["target"] == "red" for row in rows)
    choose = made.spec.method.choose
    assert choose.succeeded({"turned": False, "others_kept": True})
    assert not choose.succeeded({"turned": True, "others_kept": True})


def test_sets_and_places_follow_from_the_labels_that_pictures_come_from() -> None:
    contrasts = torch.tensor(
        [[0.0, 3.0, 2.0, -1.0, 0.0], [4.0, 0.0, 0.5, -2.0, 0.0], [0.0, -1.0, 0.0, 5.0, 1.0]]
    )
    means = LatentMeans(("blue", "green", "red"), contrasts, contrasts.abs() + 1, contrasts)
    one = LatentChoice(**CHOOSE | {"against": "red", "where": 2})
    every = LatentChoice(**CHOOSE | {"where": 1})
    assert one.marks(means, "blue") == (3, 4) and every.marks(means, "blue") == (0, 3)
    gone = LatentChoice(**CHOOSE | {"where": 2, "goal": "remove"})
    assert (
        gone.marks(means, "blue") == (1, 2) and LatentChoice(**CHOOSE).marks(means, "red") is None
    )
    assert one.rivals(means.labels, "blue") == ["red"]
    assert every.rivals(means.labels, "blue") == ["green", "red"]
    assert means.by_label("blue", ["red"], 3, 1) == FeatureSet((1, 3, 4), (4.0, 0.0, 0.0))
    assert means.by_label("blue", ["green", "red"], 2, 1) == FeatureSet((1, 0), (4.0, 0.0))
    red, green = (Item("0", "a", None, {"source_color": each}) for each in ("red", "green"))
    assert one.concerns(red, "blue") and not one.concerns(green, "blue")
    assert every.concerns(green, "blue") and not every.concerns(green, "green")
    assert gone.concerns(red, "red") and not gone.concerns(green, "red")
    assert list(one.labels()) == ["blue", "green"]
    assert "red" not in LatentChoice(**CHOOSE | {"against": "red", "targets": None}).labels()


@pytest.mark.parametrize(
    ("choose", "changes", "text"),
    [
        ({}, {"features": [1]}, "give one of features and choose"),
        ({"sizes": [2, 2]}, {}, "a size is there twice"),
        ({"label": "hue"}, {}, "has no value in the column hue; it has source_color"),
        ({"targets": ["mauve"]}, {}, "label of method.choose 'mauve'"),
        (
            {"trial": {"scenes": TRIAL | {"source": {"color": "blue"}}}},
            {},
            "no prompt to add 'blue'",
        ),
        ({"fit": {"scenes": FIT | {"source": {"color": "blue"}}}}, {}, "'blue' is the only label"),
        ({"success": "nothing"}, {}, "no metric of pictures gives 'nothing'; there are"),
        ({}, {"sites": SITES}, "chosen at one site, got 2 cells"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(choosing, tmp_path, choose, changes, text) -> None:
    with pytest.raises((InvalidInput, UnknownName), match=text):
        choosing(choose, **changes).run(tmp_path / "run")


def test_the_spec_of_a_choice_comes_back(chosen) -> None:
    made, _ = chosen
    spec = yaml.safe_load((made.job.folder.path / "spec.yaml").read_text())
    assert spec["method"]["choose"]["targets"] == ["blue", "green"]
    assert spec["method"]["features"] is None


@pytest.mark.parametrize(
    "name", ["turn-colour", "turn-colour-dit", "turn-colour-red-dit", "remove-colour"]
)
def test_examples_read_what_another_example_trains(tmp_path: Path, name: str) -> None:
    examples = Path(__file__).parents[3] / "examples" / "sae"
    spec = yaml.safe_load((examples / f"{name}.yaml").read_text())
    method = spec["method"]
    trained = Path(method["autoencoder"]["file"])
    source = SaeJob.from_file(examples / ("colour-dit.yaml" if "dit" in name else "colour.yaml"))
    assert trained.parts[3] == source.folder.name
    assert method["sites"] in source.spec.sites and method["sites"] in trained.name

    sae = SparseAutoencoder(8, 512, TopK(4))
    sae.statistics["frequency"] = torch.full((512,), 4 / 512)
    sae.save(tmp_path / "sae.safetensors")
    method["autoencoder"]["file"] = str(tmp_path / "sae.safetensors")
    assert method["sites"] in str(dr.Experiment(**spec).plan())


@pytest.mark.parametrize(
    ("choose", "changes", "text"),
    [
        ({}, {"op": "scale"}, "op: scale changes only codes that are there; to add, take set"),
        ({"goal": "remove"}, {"op": "set"}, "to remove, ablate"),
        ({"against": "blue"}, {}, "against: blue is one of targets"),
    ],
)
def test_choices_that_cannot_work_are_refused(choosing, choose, changes, text) -> None:
    with pytest.raises(InvalidInput, match=text):
        choosing(choose, **changes)


def test_success_is_whether_something_holds(choosing, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="pixel_distance is a number, not whether"):
        choosing({"success": "pixel_distance"}).run(tmp_path / "run", progress=False)
