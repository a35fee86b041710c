"""Transfer in experiments: from a model to itself everything is known, so shares are 1."""

from typing import Any

import pytest
import torch

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments import Experiment
from dreamreader.experiments.pages import page_of
from dreamreader.experiments.pages.transfer import TransferPage
from dreamreader.mapping import ActivationMap, AffineMap, map_direction
from dreamreader.steering import Directions

from ..conftest import PAIRS

SITE = "unet.up_blocks.2.attentions.0.transformer_blocks.0.attn2"
TWIN = "unet.up_blocks.2.attentions.1.transformer_blocks.0.attn2"
FIT = {"pairs": [{"source": f"a red {s}", "target": f"a blue {s}"} for s in ("star", "ring")]}
MAPPED = {"prompts": [f"a {c} {s}" for c in ("red", "blue", "green") for s in ("star", "square")]}


def transfer(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "transfer",
        "source": "shapes-unet",
        "sites": SITE,
        "map_data": MAPPED,
        "maps": [
            {"method": "identity", "name": "same"},
            {"method": "ridge", "name": "ridge", "options": {"lambdas": 0.001}},
        ],
        "fit": FIT,
        "fit_seeds": [7, 8],
        "branch": "cond",
        "strengths": [2.0],
        **changes,
    }


def test_a_direction_of_the_model_itself_has_the_whole_effect(experiment, tmp_path) -> None:
    made = experiment(data={"pairs": PAIRS}, method=transfer(), seeds=[3, 4], batch={"rows": 4})
    results = made.run(tmp_path / "run")
    assert results.conditions == [
        "unedited", "target_prompt", "native", "edited", "random_direction", "unmapped",
        "mean_ablated",
    ]  # fmt: skip
    method, folder = results.spec.method, tmp_path / "run"
    found = {n: Directions.load(method.directions_file(folder, n)) for n in ("native", "same")}
    assert torch.equal(found["same"][SITE], found["native"][SITE])
    same = [row["digest"] for row in results.of("edited", map="same")]
    assert same == [row["digest"] for row in results.of("native")]
    assert same != [row["digest"] for row in results.of("random_direction")]
    page = page_of(results)
    assert isinstance(page, TransferPage)
    shares = page.shares()
    assert (shares["same"].value, shares["same"].low, shares["native"].value) == (1, 1, 1)
    assert shares["ridge"].n == len(PAIRS) == len(results.of("native")) / 2  # seeds are no prompts
    assert shares["unmapped"].value == pytest.approx(1) and shares["random direction"].value < 0.9
    assert shares["ridge"].value == pytest.approx(1, abs=0.1)  # of rows that are equal
    own = ActivationMap.load(method.map_file(folder, "ridge", SITE))
    ridge = Directions.load(method.directions_file(folder, "ridge"))[SITE]
    torch.testing.assert_close(ridge, map_direction(own, found["native"][SITE]))
    assert isinstance(own, AffineMap) and own.card.scores["fvu"] < 0.05
    assert (own.card.source_model, own.card.target_site) == ("shapes-unet", SITE)
    lines = Experiment.summary(results.folder)
    assert "  share of the native effect, same: 1 (1 to 1)" in lines
    titles = [each.title for each in page.sections()]
    assert titles[:2] == ["Transfer", "Maps"]


def test_what_is_added_is_the_direction_that_was_mapped(experiment, tmp_path) -> None:
    """From another site: the map of it, not the subject's own direction."""
    maps = [{"method": "steps", "name": "steps", "options": {"lambdas": 0.1}}, "noise"]
    method = transfer(source_sites={SITE: TWIN}, maps=maps, controls=[])
    made = experiment(data={"pairs": PAIRS}, method=method, batch={"rows": 4})
    results = made.run(tmp_path / "run")
    assert results.conditions == ["unedited", "native", "edited"]
    job, method = made.job, results.spec.method
    for name in ("steps", "noise"):
        own = ActivationMap.load(method.map_file(tmp_path / "run", name, SITE))
        assert own.card.source_site == TWIN
        rows = [row for row in job.rows if row.axes.get("map") == name]
        (edit,) = method.edits_of(job, rows)
        added = edit.direction[SITE]
        assert torch.equal(added, job.memory["carried"][name][SITE])
        cosine = torch.cosine_similarity(added, job.memory["carried"]["native"][SITE])
        assert added.shape == (2, 96) and bool((cosine < 0.999).all())


def test_an_edit_of_the_model_itself_has_the_whole_effect(experiment, tmp_path) -> None:
    method = transfer(carry="loreft", rank=2, training={"steps": 3, "batch_size": 16})
    made = experiment(data={"pairs": PAIRS}, method=method, batch={"rows": 4})
    results = made.run(tmp_path / "run")
    native = [row["digest"] for row in results.of("native")]
    assert [row["digest"] for row in results.of("edited", map="same")] == native
    assert [row["digest"] for row in results.of("unmapped")] == native
    assert [row["digest"] for row in results.of("unedited")] != native
    page = page_of(results)
    assert isinstance(page, TransferPage) and page.shares()["same"].value == 1
    assert page.sections()
    back = ActivationMap.load(results.spec.method.map_file(tmp_path / "run", "ridge", SITE, "back"))
    assert (back.card.source_model, back.d_source) == ("shapes-unet", 96)


def test_what_cannot_be_carried(experiment, tmp_path) -> None:
    def run(**changes: Any) -> None:
        experiment(data={"pairs": PAIRS}, method=transfer(**changes)).run(tmp_path / "run")

    with pytest.raises(InvalidInput, match="method.*maps.*ridgy"):
        run(maps=["ridgy"])
    with pytest.raises(InvalidInput, match="two have one name, or the same but for spaces"):
        run(maps=["ridge", "ridge"])
    with pytest.raises(InvalidInput, match="two have one name, or the same but for spaces"):
        run(maps=[{"method": "ridge", "name": "a b"}, {"method": "identity", "name": "a-b"}])
    with pytest.raises(InvalidInput, match="mean ablated is the name of a condition"):
        run(maps=[{"method": "ridge", "name": "mean ablated"}])
    with pytest.raises(InvalidInput, match="an edit is read and written by affine maps .*, noise"):
        run(carry="loreft", maps=["noise"])
    with pytest.raises(InvalidInput, match="native is the name of a condition; choose another"):
        run(maps=[{"method": "ridge", "name": "native"}])
    with pytest.raises(UnknownName, match="source_sites: site of the cells 'unet.mid_block'"):
        run(source_sites={"unet.mid_block": SITE})
    with pytest.raises(InvalidInput, match="method.maps.0.options: .*a rank .* from 1, got 0"):
        run(maps=[{"method": "reduced_rank", "name": "a", "options": {"rank": 0}}])
    with pytest.raises(InvalidInput, match="method.maps.1.options: unknown option .* nearest: k"):
        run(maps=["ridge", {"method": "local", "options": {"kk": 3}}])
