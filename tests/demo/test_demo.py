import json
import re

import numpy as np
import pytest
import torch
from tiny.embedded import untrained

from dreamreader.demo import Plan, run_demo
from dreamreader.demo.data import split
from dreamreader.demo.measure import Outcome, judge
from dreamreader.demo.steer import Point, choose
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.zoo import scenes
from dreamreader.zoo.detector import detect

TINY = Plan(
    steps=4,
    fit=1,
    choose=1,
    refine=1,
    finalists=2,
    test=2,
    patch=1,
    curve=1,
    strengths=(1.0, 4.0),
    windows=2,
    batch=8,
)


def outcome(turned: float, kept: float, n: int = 10) -> Outcome:
    def of(share: float) -> list[bool]:
        return [i < share * n for i in range(n)]

    return Outcome(of(turned), of(0), of(kept), of(kept))


def picture(color: str, shape: str = "circle", row: str = "top") -> torch.Tensor:
    scene = scenes.Scene((scenes.Obj(shape, color, "large", row, "left"),), "white")
    return torch.from_numpy(np.array(scenes.render(scene))).permute(2, 0, 1) / 255


def test_sets_are_disjoint_and_repeatable():
    plan = Plan()
    parts = split(plan)
    sets = (parts.fit, parts.choose, parts.refine, parts.test, parts.patch)
    rows = [row for each in sets for row in each]
    assert [len(each) for each in sets] == [
        plan.fit, plan.choose, plan.refine, plan.test, plan.patch,
    ]  # fmt: skip
    assert len({row.seed for row in rows}) == len(rows)
    assert len({row.prompt("red") for row in rows}) == len(rows)
    assert split(plan) == parts and split(Plan(seed=1)) != parts
    assert not {(c, row.scene.objects[0].shape) for row in rows for c in ("red", "blue")} & (
        scenes.HELD_OUT_PAIRS
    )


def test_prompts_of_a_pair_differ_in_one_word():
    for row in split(Plan()).fit:
        red, blue = row.prompt("red").split(), row.prompt("blue").split()
        assert [(a, b) for a, b in zip(red, blue, strict=True) if a != b] == [("red", "blue")]


def test_judge_reads_color_and_place():
    before = detect(torch.stack([picture("red")] * 4))
    after = [
        picture("blue"),
        picture("red"),
        picture("blue", row="bottom"),
        picture("blue", "star"),
    ]
    found = judge(torch.stack(after), before, "red", "blue")
    assert found.turned == [True, False, True, True] and found.source == [False, True, False, False]
    assert found.kept == [True, True, False, False]
    blank = judge(torch.full((1, 3, 64, 64), 0.96), before[:1], "red", "blue")
    assert (blank.turned, blank.kept, blank.rest) == ([False], [False], [False])


def test_choice_is_as_good_as_its_worse_half():
    points = [
        Point("a", "all steps", 8.0, outcome(1.0, 0.5)),
        Point("b", "all steps", 4.0, outcome(0.8, 0.9)),
        Point("b", "all steps", 2.0, outcome(0.8, 0.9)),
        Point("c", "all steps", 2.0, outcome(0.8, 0.8)),
        Point("d", "all steps", 1.0, outcome(0.4, 1.0)),
    ]
    assert choose(points) is points[2]
    assert choose(points[::-1]) is points[2]
    assert choose(points[:1]) is points[0]


def test_plan_refuses_what_the_world_does_not_have():
    with pytest.raises(UnknownName, match="unknown colour 'purpel'; nearest: purple"):
        Plan(target="purpel")
    with pytest.raises(InvalidInput, match="both red"):
        Plan(target="red")
    with pytest.raises(InvalidInput, match="the demo needs 1[0-9]{3} scenes, there are 216"):
        split(Plan(test=1000))
    assert [list(w) for w in TINY.patch_windows] == [[0, 1], [2, 3]]
    assert list(TINY.window("second half")) == [2, 3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    reader = Reader(untrained())
    before = {k: v.clone() for k, v in reader.subject.unet.state_dict().items()}
    result = run_demo(reader, TINY, out)
    assert all(torch.equal(v, before[k]) for k, v in reader.subject.unet.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in reader.subject.unet.modules())
    return result, out


def test_demo_writes_report_results_and_edit(finished):
    result, out = finished
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert names == ["edits/red-to-blue.safetensors", "report.html", "results.json"]
    found = json.loads((out / "results.json").read_text())
    assert found["fingerprint"]["digest"] == result.fingerprint.digest
    places = len(result.places)
    assert len(found["sweep"]) == places * 3 * 2 and len(found["patching"]) == places * 3
    assert found["test"]["direction"]["turned"]["n"] == 2
    assert [point["turned"]["n"] for point in found["finalists"]] == [2, 2]
    assert found["pictures"] == result.pictures
    assert len(found["explained"]) == 3 * len(result.places[-1].sites)
    assert all(len(line) == TINY.steps for line in found["explained"].values())


def test_report_says_what_was_found(finished):
    result, out = finished
    text = (out / "report.html").read_text()
    for heading in (
        "Pictures",
        "Where the colour can be read",
        "Strength, site and step window",
        "Taking red out",
        "What fired",
    ):
        assert f">{heading}</h2>" in text
    assert result.fingerprint.digest in text and result.confirmed.rows[0].prompt("red") in text
    assert text.count('class="plot"') == 2 and text.count('class="heat"') == 5
    assert re.findall(r'alt=""', text) == [] and len(re.findall("<img ", text)) > 20


def test_random_control_has_the_norm_of_the_direction(finished):
    result, _ = finished
    from dreamreader.demo.directions import controls, difference

    real = difference(result.means, result.places[-1], "red", "blue")
    random = controls(real, 1)
    assert real and all(v.shape[0] == TINY.steps for v in real.values())
    for site, v in real.items():
        assert torch.allclose(random[site].norm(dim=1), v.norm(dim=1), rtol=1e-4)
        cosine = torch.cosine_similarity(random[site], v).abs()
        assert float(cosine.max()) < 0.5


def test_every_edit_fired_where_it_should(finished):
    result, _ = finished
    titles = [title for title, _ in result.fired]
    assert titles == [
        *(f"steer {place.name}" for place in result.places),
        *["refine"] * TINY.finalists,
        "test, direction", "test, random", "remove, projected out", "remove, random projected out",
        *(f"patch {place.name}" for place in result.places),
    ]  # fmt: skip
    for _, report in result.fired:
        assert report.warnings == []
        for each in report:
            assert each.calls and set(each.branches) == {"cond"}


def test_patching_everything_everywhere_gives_nearly_the_clean_run(finished):
    """All that the prompt says reaches the UNet through the cross-attention outputs."""
    result, _ = finished
    found = result.patching
    assert found.windows[-1] == "all" and found.places[-1] == "all blocks"
    assert torch.allclose(found.patched[-1][-1], found.clean[0], atol=1e-3)
    assert not torch.allclose(found.corrupted[0], found.clean[0], atol=1e-2)
    assert not torch.allclose(found.patched[-1][0], found.clean[0], atol=1e-3)


def test_saved_edit_loads_equal(finished):
    from dreamreader.edits import load

    result, out = finished
    (edit,) = load(out / "edits" / "red-to-blue.safetensors")
    assert tuple(edit.sites) == tuple(result.best_place.sites) and edit.branch == "cond"
    assert list(edit.alpha) == [result.best.strength]


def test_same_plan_same_digest_and_numbers(finished, tmp_path):
    result, _ = finished
    again = run_demo(Reader(untrained()), TINY, tmp_path)
    assert again.fingerprint.digest == result.fingerprint.digest
    assert again.as_dict()["test"] == result.as_dict()["test"]


def test_a_pipeline_without_a_unet_is_refused(tmp_path):
    from torch import nn

    class Other:
        components = {"transformer": nn.Linear(1, 1)}

    with pytest.raises(InvalidInput, match="needs a pipeline with a UNet .* got Linear"):
        run_demo(Reader(nn.Linear(1, 1)), TINY, tmp_path)
    assert list(tmp_path.iterdir()) == []
