"""The demo as a chain of jobs, on an untrained model: what is run, written and said."""

import json
import re

import pytest
import torch
from tiny.embedded import untrained

from dreamreader.demo import Plan, run_demo
from dreamreader.demo.plan import SPECS
from dreamreader.demo.result import Setting, share
from dreamreader.demo.run import find_places, label_means
from dreamreader.edits import load
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments import load_results
from dreamreader.jobs.kinds import job_type, list_jobs
from dreamreader.specs.data import read_items
from dreamreader.steering import Directions, LabelMeans
from dreamreader.store import Store
from dreamreader.sweep import Cell
from dreamreader.zoo import scenes

JOBS = ["record", "sweep", "refine", "test", "dose", "remove", "patch"]
ONE = ["data.limit=1"]
CHANGES = {
    "all": ["pipeline.num_inference_steps=4"],
    "record": ["data.scenes.count=1"],
    "sweep": ["method.windows=[[0,4],[2,4]]", "method.strengths=[1,4]", *ONE],
    "patch": ["method.windows=[[0,2],[0,4]]", *ONE],
    **dict.fromkeys(["refine", "test", "dose", "remove"], ONE),
}
TINY = Plan(changes=CHANGES, finalists=2)


def rows(turned: int, kept: int) -> list[dict[str, bool]]:
    """Ten rows, so many of which are turned and kept."""
    return [
        {"turned": n < turned, "shape_kept": n < kept, "place_kept": True, "rest_kept": True}
        for n in range(10)
    ]


@pytest.mark.parametrize("plan", [Plan(), Plan(source="green", target="purple", seed=3)])
def test_specs_share_no_scene_and_no_seed(plan):
    specs = {name: plan.spec(name) for name in ("record", "sweep", "refine", "test", "patch")}
    assert sorted(f"{name}.yaml" for name in JOBS) == sorted(f.name for f in SPECS.iterdir())
    prompts = [item.prompt for spec in specs.values() for item in read_items(spec.data)]
    seeds = [seed for spec in specs.values() for seed in spec.seed_list]
    assert len(prompts) == len(set(prompts)) == 39 and len(seeds) == len(set(seeds)) == 7
    shown = {(plan.source, s) for s in scenes.SHAPES} | {(plan.target, s) for s in scenes.SHAPES}
    for color, shape in shown & scenes.HELD_OUT_PAIRS:
        assert not any(f" {shape} " in prompt for prompt in prompts), color
    test = read_items(plan.spec("test").data)
    for name in ("dose", "remove"):
        assert read_items(plan.spec(name).data) == test[:10]


def test_pairs_differ_in_one_word():
    for item in read_items(Plan().spec("test").data):
        pair = zip(item.prompt.split(), item.target.split(), strict=True)
        assert [(a, b) for a, b in pair if a != b] == [("red", "blue")]


def test_another_seed_draws_other_scenes_and_noise():
    first, other = (Plan(seed=seed).spec("test") for seed in (0, 1))
    assert read_items(first.data) != read_items(other.data)
    assert not set(first.seed_list) & set(other.seed_list)
    assert Plan().small().spec("test").data.limit == 2


def test_a_setting_is_as_good_as_its_worse_half():
    def at(strength: float, turned: int, kept: int) -> Setting:
        return Setting(Cell("a", ()), strength, rows(turned, kept))

    best = at(2.0, 8, 9)
    others = [at(8.0, 10, 5), at(4.0, 8, 9), at(2.0, 8, 8), at(1.0, 4, 10)]
    assert max([*others, best], key=lambda each: each.rank) is best
    assert max([best, *others], key=lambda each: each.rank) is best
    assert share(rows(3, 9), "turned").value == 0.3 and share(rows(3, 9), "kept").value == 0.9


def test_plan_refuses_what_the_world_does_not_have():
    with pytest.raises(UnknownName, match="unknown colour 'purpel'; nearest: purple"):
        Plan(target="purpel")
    with pytest.raises(InvalidInput, match="both red"):
        Plan(target="red")
    many = Plan(changes={"patch": ["data.scenes.count=1000"]}).spec("patch").data
    with pytest.raises(InvalidInput, match="1000 are asked for behind the first 36, there are"):
        read_items(many)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    reader = Reader(untrained())
    before = {k: v.clone() for k, v in reader.subject.unet.state_dict().items()}
    result = run_demo(reader, TINY, out)
    assert all(torch.equal(v, before[k]) for k, v in reader.subject.unet.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in reader.subject.unet.modules())
    return result, out


def test_demo_writes_report_results_edit_and_a_folder_for_each_job(finished):
    result, out = finished
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*JOBS, "directions", "edits", "report.html", "results.json"]
    )
    states = {name: state for name, _, _, state in list_jobs(out)}
    assert states == dict.fromkeys(JOBS, "complete")
    found = json.loads((out / "results.json").read_text())
    assert list(found["jobs"]) == JOBS and found["pictures"] == result.pictures
    for name in JOBS[1:]:
        folder = load_results(out / name).folder
        assert found["jobs"][name]["fingerprint"] == folder.run
    assert len(found["sweep"]) == 6 * 2 * 2 and len(found["patching"]) == 6 * 2
    assert found["test"]["edited"]["turned"]["n"] == 2
    assert [point["turned"]["n"] for point in found["finalists"]] == [2, 2]
    assert [point["strength"] for point in found["curve"]["edited"]] == [0, 1, 4]
    assert [each["turned"]["n"] for each in found["removal"].values()] == [1, 1, 1]
    assert len(found["explained"]) == 21 and {len(v) for v in found["explained"].values()} == {4}


def test_report_says_what_was_found(finished):
    result, out = finished
    text = (out / "report.html").read_text()
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", text)
    assert headings == [
        "Pictures", "Where the colour can be read", "Strength, site and step window",
        "Taking red out", "Where and when the colour enters", "What fired", "Fingerprint",
    ]  # fmt: skip
    assert result.jobs["test"]["fingerprint"][:16] in text
    assert result.test.of("edited")[0]["prompt"] in text
    assert text.count('class="plot"') == 2 and text.count('class="heat"') == 4
    assert re.findall(r'alt=""', text) == [] and len(re.findall("<img ", text)) > 20
    assert "red to blue on 2 held-out rows, at " in result.summary()


def test_directions_are_differences_of_the_recorded_means(finished):
    result, out = finished
    reader, store = Reader(untrained()), Store(out / "record")
    site = find_places(reader)["all blocks"][0]
    found, means = store.read(site), {}
    for color in ("red", "blue", "green"):
        chosen = [n for n, each in enumerate(found.keys["color"].to_pylist()) if each == color]
        steps = torch.tensor(found.keys["step"].to_pylist())[chosen]
        values = found.values[chosen].double()
        means[color] = torch.stack([values[steps == step].mean(0) for step in range(4)])
    again: LabelMeans = label_means(store, "color")
    for color, mean in means.items():
        assert torch.allclose(again.mean(site, color), mean, rtol=1e-12)
    saved = Directions.load(out / "directions" / "direction.safetensors")
    assert torch.allclose(saved[site], (means["blue"] - means["red"]).float(), atol=1e-7)
    drawn = found.keys.select(["prompt", "seed"]).to_pylist()
    assert len({(each["prompt"], each["seed"]) for each in drawn}) == 2 * len(scenes.COLORS)


def test_every_edit_fired_where_it_should(finished):
    _, out = finished
    for name in JOBS[1:]:
        lines = [line for batch in load_results(out / name).folder.firing() for line in batch]
        worked = [line for line in lines if line["calls"] > line["passed_over"]]
        assert worked and {tuple(line["branches"]) for line in worked} == {("cond",)}
        assert all(line["calls"] and not line["notes"] for line in lines)


def test_patching_everything_everywhere_gives_nearly_the_clean_run(finished):
    """All that the prompt says reaches the UNet through the cross-attention outputs."""
    result, _ = finished
    found = result.patching
    (patched,) = found.of("patched", cell_place="all blocks · cond", cell_steps="steps 0–3")
    images = [
        torch.tensor(list(found.image(row).tobytes())).float()
        for row in (patched, found.of("clean")[0], found.of("corrupted")[0])
    ]
    assert (images[0] - images[1]).abs().max() <= 1 and not torch.equal(images[1], images[2])


def test_saved_edit_loads_equal(finished):
    result, out = finished
    (edit,) = load(out / "edits" / "red-to-blue.safetensors")
    assert tuple(edit.sites) == result.best.cell.sites and edit.branch == "cond"
    assert edit.alpha == result.best.strength and list(edit.steps) == list(result.best.cell.window)


def test_a_stopped_demo_goes_on_to_the_same_numbers(finished, tmp_path):
    result, out = finished

    class Stopped(Exception):
        pass

    def stop(event):
        if event.stage == "sweep" and event.done:
            raise Stopped

    with pytest.raises(Stopped):
        run_demo(Reader(untrained()), TINY, tmp_path, stop)
    assert dict((name, state) for name, _, _, state in list_jobs(tmp_path))["record"] == "complete"
    written = {f: f.stat().st_mtime_ns for f in (tmp_path / "record").rglob("*.safetensors")}
    again = run_demo(Reader(untrained()), TINY, tmp_path)
    assert written and all(f.stat().st_mtime_ns == at for f, at in written.items())
    assert again.jobs == result.jobs
    assert (tmp_path / "results.json").read_bytes() == (out / "results.json").read_bytes()
    with pytest.raises(InvalidInput, match="record holds another harvest: settings.spec"):
        run_demo(Reader(untrained()), Plan(seed=1, changes=CHANGES), tmp_path)


def test_a_job_of_the_demo_is_like_any_other(finished):
    _, out = finished
    kind = job_type("experiment")
    spec = kind.of_folder(out / "test").spec
    assert spec.method.kind == "steer" and spec.subject.model == "shapes-unet"


def test_a_pipeline_without_a_unet_is_refused(tmp_path):
    from torch import nn

    with pytest.raises(InvalidInput, match="needs a pipeline with a UNet .* got Linear"):
        run_demo(Reader(nn.Linear(1, 1)), TINY, tmp_path)
    assert list(tmp_path.iterdir()) == []
