"""Matrices of maps from a spec: the same numbers as by the functions, stopped or not."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny

from dreamreader import load
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.jobs.kinds import kind_of_file
from dreamreader.mapping import PairedRows, fit_map, score_map
from dreamreader.recording import record_between
from dreamreader.training import MapMatrixJob
from dreamreader.training.map_matrix import split_prompts
from dreamreader.training.map_matrix_success import read_success
from dreamreader.zoo import settings

from .jobs import MATRIX

SITES = MATRIX["sites"]
EXAMPLES = Path(__file__).parents[2] / "examples" / "mapping"


@cache
def readers() -> tuple[Reader, Reader]:
    return load("shapes-unet"), load("shapes-unet-b")


def job(**changes: Any) -> MapMatrixJob:
    one, other = readers()
    return MapMatrixJob(reader=one, target_reader=other, **{**MATRIX, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("matrix") / "whole"
    return folder, job().run(folder, progress=False)


def test_pairs_of_sites_have_the_scores_of_maps_that_are_fitted_alone(whole: Any) -> None:
    _, found = whole
    made = job()
    folds = split_prompts(made.prompts, made.spec)
    assert {name: len(own) for name, own in folds.items()} == found["prompts"]
    rows = {}
    for name, numbers in folds.items():
        pairs = record_between(
            *readers(), [made.prompts[n] for n in numbers], SITES, SITES, align="place",
            seeds=[0] * len(numbers), schedule="target", trajectory="target", progress=False,
            **settings(num_inference_steps=2),
        )  # fmt: skip
        rows[name] = {(a, b): PairedRows.of(pairs, a, b) for a in SITES for b in SITES}
    assert len(found["pairs"]) == 4 and not found["refused"]
    for each in found["pairs"]:
        pair = each["source"], each["target"]
        fit, choose, score = (rows[name][pair] for name in ("fit", "choose", "score"))
        own = fit_map(fit.moments(), "ridge", validation=choose.moments())
        report = score_map(own, score.moments(gram=True), draws=20)
        assert each["settings"]["lambda"] == own.card.settings["lambda"]
        for name in ("fvu", "fvu_scalar", "r2", "cka_source", "cka"):
            assert each[name] == pytest.approx(getattr(report, name), rel=1e-3)
        exact = score_map(own, score, draws=20, sample=64)
        assert exact.cosine is not None and exact.retrieval is not None
        if len(score.flat()[0]) <= 64:  # then all rows were kept
            assert each["retrieval"] == pytest.approx(exact.retrieval, abs=1e-6)
            assert each["cosine"] == pytest.approx(exact.cosine, abs=1e-4)
        assert each["cosine"] == pytest.approx(exact.cosine, abs=0.1)
        assert each["rows"] == [len(fit.flat()[0]), len(score.flat()[0])]


def test_models_run_as_often_for_many_sites_as_for_one(tmp_path: Path) -> None:
    counts = []
    for number, sites in enumerate((["unet.mid_block"], ["unet.mid_block", "unet.up_blocks.*"])):
        calls = [0, 0]

        def count(side: int, calls: list[int] = calls) -> Any:
            def hook(*_: Any) -> None:
                calls[side] += 1

            return hook

        handles = [
            reader.subject.unet.register_forward_pre_hook(count(side))
            for side, reader in enumerate(readers())
        ]
        found = job(sites=sites, draws=1).run(tmp_path / str(number), progress=False)
        for handle in handles:
            handle.remove()
        counts.append(calls)
        assert len(found["pairs"]) == len(found["sites"][0]) ** 2
    assert counts[0] == counts[1] and min(counts[0]) > 0


def test_a_stopped_matrix_goes_on_to_the_same_numbers(whole: Any, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if event.stage == "recordings" and event.done == 2:
            raise Stop

    with pytest.raises(Stop):
        job().run(tmp_path, progress=stop)
    assert sorted(each.name for each in (tmp_path / "moments").iterdir()) == ["fit.safetensors"]
    seen: list[float] = []
    found = job().run(
        tmp_path, progress=lambda e: seen.append(e.done) if e.stage == "recordings" else None
    )
    assert seen == [3, 4] and found == whole[1]
    assert not (tmp_path / "moments").exists()
    content = [json.loads((each / "result.json").read_text()) for each in (whole[0], tmp_path)]
    assert content[0] == content[1]


def test_the_report_shows_matrices_and_what_predicts_success(tmp_path: Path) -> None:
    lines = ["source,target,success"]
    lines += [f"{a},{b},{n / 4}" for n, (a, b) in enumerate((a, b) for a in SITES for b in SITES)]
    (tmp_path / "stitched.csv").write_text("\n".join(lines))
    made = job(stitching={"file": str(tmp_path / "stitched.csv")})
    found = made.run(tmp_path / "out", progress=False)
    assert [
        each["success"] for each in sorted(found["pairs"], key=lambda p: (p["source"], p["target"]))
    ] == [0, 0.25, 0.5, 0.75]
    assert set(found["predicts"]) == {"explained", "cosine", "cka_source", "retrieval"}
    assert all(
        -1 <= low <= value <= high <= 1 for value, low, high, _ in found["predicts"].values()
    )
    page = (tmp_path / "out" / "report.html").read_text()
    for text in ("Explained by the map", "Linear CKA", "Retrieval", "What predicts stitching"):
        assert text in page


def test_success_is_that_of_a_stitching_experiment_where_ablation_harms(tmp_path: Path) -> None:
    rows = [{"condition": "unedited", "cell": None, "map": None, "strength": None, "scene_right": x}
            for x in (True, True, True, False)]  # fmt: skip
    for cell, ablated, stitched in (("a > x", 0.25, 0.5), ("b", 0.75, 0.75), ("c", 0.0, 0.25)):
        own = {"cell": cell, "strength": 1.0}
        rows.append({**own, "condition": "mean_ablated", "map": "mean", "scene_right": ablated})
        rows.append({**own, "condition": "stitched", "map": "ridge", "scene_right": stitched})
        rows.append({**own, "condition": "stitched", "map": "local k=3", "scene_right": 1.0})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    sites = ["a", "b", "c"], ["x", "b", "c"]
    found = read_success(file, sites, "scene_right", "ridge", 0.5)
    assert found == {("a", "x"): pytest.approx(2 / 3), ("c", "c"): pytest.approx(1 / 3)}
    few = {"condition": "stitched", "map": "ridge", "strength": 1.0, "scene_right": 0.0}
    more = [{"fit_prompts": 8} | row for row in rows] + [few | {"cell": "c", "fit_prompts": 2}]
    file.write_text("\n".join(map(json.dumps, more)))
    assert read_success(file, sites, "scene_right", "ridge", 0.5) == found  # of the most prompts
    with pytest.raises(UnknownName, match="effect 'scene_riht'; nearest: scene_right"):
        read_success(file, sites, "scene_riht", "ridge", 0.5)
    with pytest.raises(InvalidInput, match="no pair of sites where procrustes was stitched and"):
        read_success(file, sites, "scene_right", "procrustes", 0.5)
    with pytest.raises(UnknownName, match="source site 'a'"):
        read_success(file, (["b", "c"], sites[1]), "scene_right", "ridge", 0.5)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("matrix*.yaml")), ids=lambda path: path.stem)
def test_examples_are_specs(path: Path) -> None:
    made = MapMatrixJob.from_file(path)
    assert kind_of_file(path) == "map-matrix"
    if made.spec.subject.model == "shapes-unet":
        plan = made.plan()
        assert len(plan.source) >= 14 and len(plan.target) >= 12 and plan.prompts["fit"] >= 30


def test_models_of_other_kinds_sites_and_files_that_cannot_be_are_refused(tmp_path: Path) -> None:
    language = Reader(*tiny.language_model("gpt2"))
    with pytest.raises(
        InvalidInput, match="a language model and a pipeline have no calls in common"
    ):
        MapMatrixJob(reader=readers()[0], target_reader=language, **MATRIX).run(tmp_path / "a")
    with pytest.raises(UnknownName, match="unknown site 'unet.middle'"):
        job(sites="unet.middle").plan()
    with pytest.raises(InvalidInput, match="1 different prompts cannot be split into some to fit"):
        job(data={"prompts": ["a red circle", "a red circle"]}).plan()
    with pytest.raises(InvalidInput, match="chosen 0.5 and held_out 0.6 leave no prompts"):
        job(chosen=0.5, held_out=0.6)
    with pytest.raises(InvalidInput, match="options: reduced_rank: a rank .* from 1, got 0"):
        job(map="reduced_rank", options={"rank": 0})
    with pytest.raises(InvalidInput, match="options: unknown option of ridge 'rank'; nearest: lam"):
        job(options={"rank": 2})
    file = tmp_path / "stitched.jsonl"
    file.write_text('{"source": "unet.mid_block", "target": "unet.mid", "success": 1}')
    with pytest.raises(UnknownName, match="target site 'unet.mid'"):
        job(stitching={"file": str(file)}).plan()
    file.write_text('{"source": "unet.mid_block", "target": "unet.mid_block", "success": "much"}')
    with pytest.raises(InvalidInput, match="success must be a number, got 'much'"):
        job(stitching={"file": str(file)}).run(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_language_models_are_mapped_by_the_spans_of_their_texts(tmp_path: Path) -> None:
    one, other = (Reader(*tiny.language_model(name)) for name in ("gpt2", "gemma2"))
    texts = ["a red cat on a tree", "the blue house", "dogs love a red tree", "a cat"]
    found = MapMatrixJob(
        name="texts", reader=one, target_reader=other, target="gemma2", data={"prompts": texts},
        sites="transformer.h.*", target_sites="model.layers.*", draws=10,
    ).run(tmp_path, progress=False)  # fmt: skip
    assert len(found["pairs"]) == len(found["sites"][0]) * len(found["sites"][1])
    assert all(each["rows"][1] > 0 for each in found["pairs"])
