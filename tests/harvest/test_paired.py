"""Two subjects in one harvest: rows that pair, as `record_between` has them, stopped or not."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from dreamreader import load
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.harvest import Harvest
from dreamreader.recording import StoredPairs, StorePairs, record_between
from dreamreader.store import Store
from dreamreader.store.verify import verify

from .jobs import LAYER, MIDDLE, PROMPTS, content, gpt2, pictures, texts

UP, BLOCK = "unet.up_blocks.1", "transformer.transformer_blocks.3"


@cache
def other() -> Reader:
    return load("shapes-unet-b")


@cache
def dit() -> Reader:
    return load("shapes-dit")


def paired(reader: Reader | None = None, target: Any = None, **changes: Any) -> Harvest:
    """Three prompts with two seeds, two steps, in units of four samples and batches of three."""
    own = {"subject": "shapes-unet-b", **(target or {})}
    capture = [{"sites": UP, "dtype": "float32"}]
    fields = {"target": own, "capture": capture, "target_reader": reader or other()}
    return pictures(**(fields | changes))


def rows_of(folder: Path, *sites: str, **how: Any) -> tuple[StorePairs, StoredPairs]:
    pairs = StorePairs(Store(folder), Store(folder / "target"), *sites, **how)
    return pairs, pairs.read()


def recorded(made: Harvest, *sites: str, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows by `record_between`: sample by sample, step by step."""
    prompts = [each for each in PROMPTS for _ in range(2)]
    one, two = made.job.sides
    pairs = record_between(
        one.reader, two.reader, prompts, *sites, seeds=[0, 1] * 3, batch_size=3, progress=False,
        source_arguments=one.settings, target_arguments=two.settings, **how,
    )  # fmt: skip
    return pairs.source[sites[0]].flatten(0, 2), pairs.target[sites[1]].flatten(0, 2)


@pytest.mark.parametrize("trajectory", ["own", "source", "target"])
def test_rows_of_both_stores_are_those_of_record_between(tmp_path: Path, trajectory: str) -> None:
    made = paired(target={"trajectory": trajectory})
    store = made.run(tmp_path / "made", progress=False)
    assert store.path == tmp_path / "made" and len(store.units) == 2
    pairs, found = rows_of(store.path, UP, UP)
    assert pairs.unpaired == (0, 0) and len(found) == 6 * 2 * 64
    one, two = recorded(made, UP, UP, trajectory=trajectory)
    order = _in_order(found, 64)
    torch.testing.assert_close(found.source[order], one, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.target[order], two, atol=1e-4, rtol=1e-4)
    for each in (store.path, store.path / "target"):
        assert verify(each, progress=False).holds and Store(each).manifest.complete
    assert Harvest.verify(store.path, progress=False).holds


def _in_order(found: StoredPairs, tokens: int) -> torch.Tensor:
    """Places of rows by sample, then step: stores have them step by step within a batch."""
    sample = torch.arange(len(found)) // tokens
    keys: dict[tuple[int, int], list[int]] = {}
    for number in range(0, len(found), tokens):
        at = int(found.groups[number]), int(found.steps[number])
        keys.setdefault(at, []).append(number)  # of two seeds, in their order
    assert len(sample) == len(found)
    starts = [
        keys[group, step][seed] for group in range(3) for seed in range(2) for step in range(2)
    ]
    return torch.cat([torch.arange(start, start + tokens) for start in starts])


def test_denoisers_of_other_schedules_pair_by_the_steps_of_the_target(tmp_path: Path) -> None:
    target = {
        "subject": "shapes-dit", "schedule": "target", "trajectory": "target",
        "capture": [{"sites": BLOCK, "dtype": "float32"}],
    }  # fmt: skip
    made = paired(dit(), target)
    store = made.run(tmp_path / "made", progress=False)
    pairs, found = rows_of(store.path, UP, BLOCK)
    assert pairs.unpaired == (0, 0) and found.steps.unique().tolist() == [0, 1]
    one, two = recorded(made, UP, BLOCK, align="place", schedule="target", trajectory="target")
    order = _in_order(found, 64)
    torch.testing.assert_close(found.source[order], one, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.target[order], two, atol=1e-4, rtol=1e-4)


def test_own_trajectories_of_one_schedule_are_what_each_subject_gives_alone(
    tmp_path: Path,
) -> None:
    chosen = {"sites": MIDDLE, "tokens": {"random": 0.25}, "branch": "cond"}
    capture = [chosen | {"dtype": "float32"}]
    made = paired(capture=capture).run(tmp_path / "made", progress=False)
    alone = pictures(capture=capture).run(tmp_path / "alone", progress=False)
    one, two = (each.read(MIDDLE) for each in (made, alone))
    assert one.keys.equals(two.keys)
    torch.testing.assert_close(one.values, two.values, atol=1e-4, rtol=1e-4)
    pairs, found = rows_of(made.path, MIDDLE, MIDDLE)
    assert pairs.unpaired == (0, 0) and len(found) == len(one.values)


def language(**changes: Any) -> Harvest:
    more = Reader(*tiny.language_model("gemma2"))
    fields: dict[str, Any] = {
        "capture": [{"sites": LAYER, "dtype": "float32", "pool": "mean"}],
        "target_reader": more,
        "target": {
            "subject": "gemma2",
            "capture": [{"sites": "model.layers.1", "dtype": "float32", "pool": "mean"}],
        },
    }
    return texts(**(fields | changes))


def test_language_models_read_the_same_prompts(tmp_path: Path) -> None:
    store = language().run(tmp_path / "made", progress=False)
    pairs, found = rows_of(store.path, LAYER, "model.layers.1", branch=None)
    assert pairs.unpaired == (0, 0) and found.groups.tolist() == [0, 1, 2, 3]
    alone = texts(capture=[{"sites": LAYER, "dtype": "float32", "pool": "mean"}])
    one, two = (each.read(LAYER) for each in (store, alone.run(tmp_path / "alone", progress=False)))
    assert torch.equal(one.values, two.values) and str(one.keys.to_pylist()) == str(
        two.keys.to_pylist()
    )  # so NaN equals NaN


def test_a_harvest_that_was_stopped_between_two_seals_ends_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    whole = paired().run(tmp_path / "whole", progress=False).path
    path = paired().run(tmp_path / "made", progress=False).path
    for each in (path, path / "target"):
        manifest = each / "manifest.json"
        manifest.write_bytes((whole / each.relative_to(path) / "manifest.json").read_bytes())
    shutil.rmtree(path / "target" / "shards" / "000001")
    kept = (path / "shards" / "000001" / "unit.json").stat().st_mtime_ns
    _say_incomplete(path)
    paired().run(path, progress=False)
    assert (path / "shards" / "000001" / "unit.json").stat().st_mtime_ns == kept
    for part in (Path(), Path("target")):
        assert content(path / part) == content(whole / part)


def _say_incomplete(path: Path) -> None:
    from dataclasses import replace

    from dreamreader.store.manifest import Manifest

    for each in (path, path / "target"):
        replace(Manifest.read(each), complete=False).write(each)


def test_a_limit_counts_both_stores(tmp_path: Path) -> None:
    size = sum(
        Store(each).nbytes
        for path in [paired().run(tmp_path / "whole", progress=False).path]
        for each in (path, path / "target")
    )
    made = paired(store={"unit": 3})
    store = made.run(tmp_path / "made", limit_gb=0.6 * size / 1e9, progress=False)
    assert not store.manifest.complete and store.units == [0]
    assert Store(store.path / "target").units == [0]
    made.run(store.path, progress=False)
    assert Harvest.verify(store.path, progress=False).holds


def test_what_a_harvest_of_two_subjects_says(tmp_path: Path) -> None:
    made = paired()
    assert "2 of width" not in repr(made.plan()) and "sites     2" in repr(made.plan())
    store = made.run(tmp_path / "made", progress=False)
    lines = Harvest.summary(Harvest.folder_type(store.path))
    assert any("store of the target" in line for line in lines)
    assert set(Harvest.results(Harvest.folder_type(store.path))) == {UP, f"target {UP}"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target": {"subject": "b", "trajectory": "shared"}}, "trajectory"),
        ({"target": {"subject": "b", "capture": [{"sites": "text_encoder"}]}}, "not: their calls"),
        ({"target": {"subject": "b", "capture": [{"sites": "unet.mid"}]}}, "target: unknown site"),
        ({"target": {"subject": "b", "schedule": "source", "trajectory": "target"}}, "calls both"),
        ({"target": {"subject": "b", "pipeline": {"num_inference_steps": 3}}}, "called 2 times"),
        ({"target": {"subject": "b", "branch": "conf"}}, "conf"),
        ({"capture": [{"sites": UP, "tokens": "red"}]}, "the word 'red'"),
        ({"target_reader": gpt2(), "target": {"subject": "gpt2"}}, "a language model and a pipe"),
    ],
)
def test_subjects_whose_rows_have_no_partners_are_refused(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    fields = {"target_reader": other(), "capture": [{"sites": UP}], "target": {"subject": "b"}}
    if "target_reader" in changes:
        changes["target"]["capture"] = [{"sites": LAYER}]
    with pytest.raises((InvalidInput, UnknownName), match=text):
        pictures(**(fields | changes)).run(tmp_path / "made", progress=False)


def test_texts_and_engines_that_two_subjects_do_not_have(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="two models write other texts"):
        language(pipeline={"max_new_tokens": 2}).plan()
    with pytest.raises(InvalidInput, match="schedule 'noise' .* has no steps"):
        language(target={"subject": "g", "schedule": "noise", "capture": [
            {"sites": "model.layers.1"}]}).plan()  # fmt: skip
    with pytest.raises(InvalidInput, match="an engine is for one subject"):
        paired().run(tmp_path / "made", engine=lambda work: None, progress=False)
