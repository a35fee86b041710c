"""Adapters from specs: every loss on small models, and what the folder holds then."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dreamreader._progress import ProgressEvent
from dreamreader.errors import InvalidInput, NeverFired, UnknownName
from dreamreader.reft import ActivationMatch, Batch, Pairs, Reft
from dreamreader.training import ReftJob
from dreamreader.training.fit import evidence
from dreamreader.training.losses import PromptwiseLoss

from .jobs import MIDDLE, UP

TEXTS = [
    {"prompt": f"a {colour} cat", "completion": " sat on the mat"}
    for colour in ("red", "blue", "green", "black")
]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_folder_holds_adapters_and_what_they_reach(reft, reader, tmp_path: Path):
    events: list[ProgressEvent] = []
    found = reft({"steps": 60, "lr": 0.05}).run(tmp_path / "out", progress=events.append)
    assert isinstance(found, Reft) and found.sites == (MIDDLE, UP)
    assert {each.name for each in (tmp_path / "out").glob("[!.]*")} == {
        *("spec.yaml", "fingerprint.json", "plan.json", "adapter.safetensors"),
        *("history.jsonl", "result.json", "report.html"),
    }
    got = result(tmp_path / "out")
    assert got["prompts"] == {"trained": 3, "held_out": 1} and got["steps"] == 60
    assert got["sites"][UP] == {
        **{"width": 96, "rank": 2, "parameters": 2 * 2 * 96 + 2},
        "orthonormality": pytest.approx(0, abs=1e-6),
    }
    assert set(got["explained"]) == {UP, MIDDLE} and min(got["explained"].values()) > 0.05
    lines = history(tmp_path / "out")
    assert [each["step"] for each in lines] == list(range(1, 61))
    assert {each["step"] for each in lines if each["validation"] is not None} == set(
        range(4, 61, 4)
    )
    assert events[0] == ProgressEvent("recording", 0, 1)
    last = events[-1]
    assert (last.stage, last.done, last.total) == ("training", 60, 60)
    assert last.numbers == {"loss": pytest.approx(lines[-1]["loss"])}
    page = (tmp_path / "out" / "report.html").read_text()
    assert UP in page and "of the difference explained" in page and "held out" in page
    run = {"seeds": 3, "num_inference_steps": 2, "output_type": "latent"}
    before, after = (reader.run("a red star", edits=e, **run).output for e in ((), found.edits()))
    assert not torch.equal(before, after)


def test_a_complete_training_is_left_as_it_is(reft, reader, tmp_path: Path):
    first = reft().run(tmp_path / "out")
    files = {each: each.stat().st_mtime_ns for each in (tmp_path / "out").glob("[!.]*")}
    calls = []
    handle = reader.subject.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        again = reft().run(tmp_path / "out")
    finally:
        handle.remove()
    assert not calls
    assert {each: each.stat().st_mtime_ns for each in files} == files
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_report_that_is_missing_is_written_anew(reft, tmp_path: Path):
    reft().run(tmp_path)
    page = tmp_path / "report.html"
    before = page.read_text()
    page.unlink()
    reft().run(tmp_path)
    assert page.read_text() == before


def test_the_folder_of_another_training_is_refused(reft, tmp_path: Path):
    reft().run(tmp_path / "out")
    with pytest.raises(InvalidInput, match=r"holds another training: .*rank.*2.*3"):
        reft({"rank": 3}).run(tmp_path / "out")
    with pytest.raises(InvalidInput, match=r"holds another training: .*examples"):
        scenes = {"count": 5, "source": {"frame": "no"}, "target": {"frame": "yes"}}
        reft(data={"scenes": scenes}).run(tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(InvalidInput, match="has files, but no fingerprint.json"):
        reft().run(tmp_path / "other")


def test_noise_matching_with_an_adapter_of_every_step(reft, tmp_path: Path):
    options = {"loss": "noise", "per_step": True, "steps": 8, "batch_size": 4, "lr": 0.02}
    found = reft(options).run(tmp_path)
    assert found.steps == 2
    got = result(tmp_path)
    assert list(got["held_out"]) == ["noise"]
    before, after = got["held_out"]["noise"]
    assert after < before and got["explained"]["noise"] == pytest.approx(1 - after / before)


def test_pictures_and_their_prompts(reft, tmp_path: Path):
    rows = []
    for number, colour in enumerate(["red", "blue", "green", "yellow"]):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{number}.png")
        rows.append({"prompt": f"a {colour} circle", "image": f"{number}.png"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"loss": "denoising", "steps": 8, "batch_size": 4, "lr": 0.02}
    kept = {"data": {"prompts": ["a white star"]}, "weight": 0.5}
    job = reft({**options, "keep": kept}, data={"file": str(tmp_path / "rows.jsonl")})
    job.run(tmp_path / "out")
    before, after = result(tmp_path / "out")["held_out"]["denoising"]
    assert after < before
    assert result(tmp_path / "out")["held_out"]["keep noise"][0] < 1e-9
    assert list(result(tmp_path / "out")["explained"]) == ["denoising"]
    Image.new("RGB", (64, 64), "black").save(tmp_path / "0.png")
    changed = reft({**options, "keep": kept}, data={"file": str(tmp_path / "rows.jsonl")})
    with pytest.raises(InvalidInput, match="holds another training: .*examples"):
        changed.run(tmp_path / "out")


def test_completions_of_a_language_model(language, tmp_path: Path):
    job = ReftJob(
        name="cats",
        reader=language,
        data={"prompts": TEXTS},
        sites="transformer.h.1",
        tokens=-1,
        training={
            **{"loss": "language", "rank": 2, "steps": 20, "batch_size": 3, "lr": 0.05},
            **{"validation": 0.25, "validate_every": 10},
            "keep": {"data": {"prompts": ["the dog"]}},
        },
    )
    found = job.run(tmp_path)
    assert found.tokens == -1
    before, after = result(tmp_path)["held_out"]["language"]
    assert after < before


def test_prompts_of_a_language_model_as_pairs(language, tmp_path: Path):
    pairs = [{"source": f"the {x} cat", "target": f"the {x} dog"} for x in ("red", "big", "old")]
    job = ReftJob(
        name="dogs",
        reader=language,
        data={"pairs": pairs},
        sites="transformer.h.1",
        tokens=-1,
        training={"rank": 2, "steps": 10, "validation": 0},
    )
    assert job.run(tmp_path).sites == ("transformer.h.1",)
    assert result(tmp_path)["held_out"] == {}
    assert "no prompts" not in (tmp_path / "report.html").read_text()


def test_several_seeds_of_a_prompt_are_held_out_together():
    base = torch.arange(24.0).reshape(6, 2, 1, 2)  # three prompts, two seeds, two calls
    pairs = Pairs({"a": base}, {"a": base + 1}, (0, 1))
    own = ActivationMatch(pairs)
    loss = PromptwiseLoss(own, 2)
    assert (loss.rows, loss.moments) == (3, 4)
    reft = Reft({"a": 2}, rank=1)
    seen = []
    own._of = lambda values, site, batch, device: (  # type: ignore[method-assign]
        seen.append(list(zip(batch.rows.tolist(), batch.moments.tolist(), strict=True)))
        or values[site][batch.rows, batch.moments]
    )
    loss.terms(reft, Batch(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 3]), 0))
    assert seen[0] == [(0, 0), (2, 1), (3, 0), (5, 1)]
    recipe = {"batch_size": 4, "validation": 0.3, "seed": 0}
    held_out, trained, held = evidence(loss, reft, recipe)
    assert (trained, held) == (2, 1) and held_out["a"][0] == pytest.approx(held_out["a"][1])


def test_a_plan_says_what_will_be_trained(reft):
    plan = reft({"per_step": True}, seeds={"count": 3}, pipeline={"num_inference_steps": 4}).plan()
    assert plan.parameters == 4 * 2 * (2 * 2 * 96 + 2)
    assert (plan.prompts, plan.seeds, plan.calls) == (4, 3, 4)
    assert plan.recording > 0 and plan.training > 0
    # fewer than 16 x 16 tokens of 96 features in float32, for both prompts of each pair and site
    assert 0 < plan.bytes <= 2 * 2 * 48 * 256 * 96 * 4
    text = repr(plan)
    for part in (f"{UP}, width 96", "parameters  3,088", "rows        12: 4 prompts, 3 seeds"):
        assert part in text
    assert "calls       48 " in text


def test_one_spec_serves_python_and_files(reader, tmp_path: Path):
    (tmp_path / "spec.yaml").write_text(
        "name: a\nsubject: shapes-unet\nsites: [unet.**.attn2]\n"
        "data: {pairs: [{source: a, target: b}]}\n"
    )
    job = ReftJob.from_file(tmp_path / "spec.yaml", ["training.rank=3", "seeds.count=2"])
    assert job.spec.training.rank == 3 and list(job.spec.seed_list) == [0, 1]
    assert ReftJob(job.spec).spec == job.spec
    with pytest.raises(InvalidInput, match="a whole spec is given, and name beside it"):
        ReftJob(job.spec, name="b")


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"data": {"prompts": ["a"]}}, InvalidInput, "entry '0' has no target prompt; give pairs"),
        ({"sites": "unet.**.attn9"}, UnknownName, "unknown site 'unet.**.attn9'; nearest: "),
        ({"sites": "vae.encoder"}, NeverFired, "vae.encoder"),
        ({"branch": "conditional"}, UnknownName, "unknown branch 'conditional'; nearest: cond"),
        ({"training": {"rank": 97}}, InvalidInput, f"{MIDDLE}: rank 97: from 1 to the width, 96"),
        ({"training": {"loss": "language"}}, InvalidInput, "needs a column completion with text"),
        (
            {"data": {"pairs": [{"source": "a", "target": "b"}]}, "training": {"validation": 0.1}},
            InvalidInput,
            "validation takes 1 of 1 rows, none is left to train on",
        ),
        (
            {"data": {"pairs": [{"source": "a", "target": "a"}]}},
            InvalidInput,
            "base and teacher have the same activations, there is nothing to learn",
        ),
    ],
    ids=["target", "site", "never", "branch", "rank", "completion", "validation", "same"],
)
def test_what_does_not_fit_is_told(reft, tmp_path, changes, kind, text: str):
    changes = dict(changes)
    if changes.get("training", {}).get("loss") == "language":
        changes["data"] = {"prompts": ["a"]}
    with pytest.raises(kind) as error:
        reft(**changes).run(tmp_path) if "training" not in changes else reft(
            changes.pop("training"), **changes
        ).run(tmp_path)
    assert text in str(error.value)


def test_losses_that_do_not_fit_the_model_are_told(reft, language, tmp_path: Path):
    texts = {"data": {"prompts": TEXTS}, "training": {"loss": "language"}}
    with pytest.raises(InvalidInput, match="language is for language models, not for pipelines"):
        reft(texts["training"], data=texts["data"]).run(tmp_path / "a")
    pairs = {"pairs": [{"source": "a", "target": "b"}]}
    job = ReftJob(name="b", reader=language, sites="transformer.h.1", data=pairs)
    changed = job.spec.model_copy(
        update={"training": job.spec.training.model_copy(update={"loss": "noise"})}
    )
    with pytest.raises(InvalidInput, match="noise is for pipelines, not for texts"):
        ReftJob(changed, reader=language).run(tmp_path / "b")
    with pytest.raises(InvalidInput, match="pipeline: a language model reads texts here"):
        ReftJob(
            name="c", reader=language, sites="transformer.h.1", data=pairs, pipeline={"top_k": 1}
        ).run(tmp_path / "c")


def test_pictures_that_cannot_be_read_are_told(reft, tmp_path: Path):
    def job(*names: str) -> ReftJob:
        rows = [{"prompt": f"a {name}", "image": str(tmp_path / name)} for name in names]
        return reft({"loss": "denoising", "validation": 0}, data={"prompts": rows})

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 32)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no picture")
    with pytest.raises(InvalidInput, match="the picture .*d.png does not exist"):
        job("a.png", "d.png").run(tmp_path / "out")
    with pytest.raises(InvalidInput, match=r"one size, .*a.png is 64 x 64 and .*b.png 64 x 32"):
        job("a.png", "b.png").run(tmp_path / "one")
    with pytest.raises(InvalidInput, match="c.png is no picture"):
        job("a.png", "c.png").run(tmp_path / "two")
