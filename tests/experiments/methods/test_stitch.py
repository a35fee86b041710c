"""Stitching in experiments: maps of the run folder, rows as `stitch` gives them, their shares."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dreamreader import load
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments import Experiment, load_results
from dreamreader.experiments.load import load_spec
from dreamreader.experiments.methods.stitch_maps import MapKey, SitePair, random_map
from dreamreader.experiments.pages import page_of
from dreamreader.experiments.results import Results
from dreamreader.mapping import ActivationMap, AffineMap, PairedRows, stitch
from dreamreader.specs.data import read_items

from .alone import STEPS, Stopping

EXAMPLES = Path(__file__).parents[3] / "examples" / "mapping"
SITE, UP = "unet.up_blocks.1", "unet.up_blocks.2"
METHOD: dict[str, Any] = {
    "kind": "stitch",
    "source": "shapes-unet",
    "sites": [SITE, {"source": UP, "target": UP}],
    "fit": {"scenes": {"count": 4, "seed": 6}},
    "held_out": 0.25,
    "maps": ["ridge", {"method": "procrustes", "options": {"scale": True}}],
    "amounts": [2, 3],
    "strengths": [1.0, 0.5],
    "effect": "brightness",
}
FIELDS: dict[str, Any] = {
    "name": "stitched",
    "subject": "shapes-unet-b",
    "data": {"scenes": {"count": 2, "seed": 5}},
    "pipeline": {"num_inference_steps": 2},
    "batch": {"rows": 2},
}
ONE = METHOD | {
    "sites": [SITE], "maps": ["ridge"], "amounts": [3], "strengths": [1.0], "controls": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Reader:
    return load("shapes-unet-b")


@pytest.fixture(scope="module")
def made(target, tmp_path_factory) -> Experiment:
    folder = tmp_path_factory.mktemp("stitch") / "run"
    found = Experiment(
        reader=target, metrics=[Stopping(), "pixel_distance", "scene"], method=METHOD, **FIELDS
    )
    found.run(folder)
    return found


@pytest.fixture(scope="module")
def results(made) -> Results:
    return load_results(made.job.folder.path)


def map_of(results: Results, row: Any) -> ActivationMap:
    key = MapKey(SitePair(source=row["cell"], target=row["cell"]), row["map"], row["fit_prompts"])
    return ActivationMap.load(results.folder.path / "artifacts" / f"{key.file}.safetensors")


def test_rows_conditions_and_their_columns(results) -> None:
    assert results.conditions == ["unedited", "mean_ablated", "random_map", "stitched"]
    names = ("cell", "map", "fit_prompts", "strength")
    settings = [
        dict.fromkeys(tuple(row[name] for name in names) for row in results.of(condition))
        for condition in results.conditions
    ]
    cells = [SITE, UP]
    assert list(settings[0]) == [(None, None, None, None)]
    assert list(settings[1]) == [(cell, "mean", 3, 1.0) for cell in cells]
    assert list(settings[2]) == [(cell, "random", 3, 1.0) for cell in cells]
    labels = ["ridge", "procrustes scale=True"]
    assert list(settings[3]) == [
        (cell, label, amount, strength)
        for cell in cells for label in labels for amount in (2, 3) for strength in (1.0, 0.5)
    ]  # fmt: skip
    assert len(results.rows) == 2 * sum(map(len, settings))


@pytest.mark.parametrize("condition", ["stitched", "mean_ablated", "random_map"])
def test_a_row_is_what_stitch_gives_with_the_map_of_the_folder(
    results, reader, target, condition
) -> None:
    where = {"cell": SITE, "fit_prompts": 3}
    rows = [row for row in results.of(condition, **where) if row["strength"] in (0.5, 1.0)]
    rows = [row for row in rows if row["strength"] == rows[-1]["strength"]]
    rows = [row for row in rows if row["map"] == rows[0]["map"]]
    own = map_of(results, rows[0])
    assert (own.card.source_model, own.card.target_model) == ("shapes-unet", "shapes-unet-b")
    found = stitch(
        reader, target, [row["prompt"] for row in rows], {SITE: (SITE, own)},
        strength=rows[0]["strength"], seeds=[row["seed"] for row in rows], progress=False, **STEPS,
    )  # fmt: skip
    for row, image in zip(rows, found.images, strict=True):
        kept = torch.tensor(list(results.image(row).tobytes())).reshape(64, 64, 3).permute(2, 0, 1)
        assert (kept / 255 - image).abs().max() < 2 / 255
        assert row["pixel_distance"] > 0.01


def test_scores_and_shares_are_those_of_the_rows(results, made) -> None:
    page: Any = page_of(results)
    scores = page.scores()
    assert set(scores) == {
        (cell, label, amount)
        for cell in (SITE, UP)
        for label in ("ridge", "procrustes scale=True")
        for amount in (2, 3)
    }
    assert scores[SITE, "ridge", 3]["fvu"] < scores[SITE, "ridge", 2]["fvu"] < 1
    best = page.best(SITE)
    rows = results.of("stitched", **best)
    base = {row["row"]: row for row in results.of("unedited")}
    wanted = sum(row["brightness"] for row in rows) / sum(
        base[row["base"]]["brightness"] for row in rows
    )
    share = page.share("stitched", **best)
    assert share.value == pytest.approx(wanted) and share.low <= wanted <= share.high
    names = ("map", "fit_prompts", "strength")
    settings = [dict(zip(names, each, strict=True)) for each in page.settings(SITE)]
    whole = [each for each in settings if each["strength"] == 1]  # a weak stitch says nothing
    every = [page.share("stitched", cell=SITE, **each) for each in whole]
    assert len(settings) == 2 * len(whole) and share.value == max(each.value for each in every)
    told = "\n".join(page.summary())
    assert told.count("mean ablated") == 2 and f"{SITE}: of native brightness" in told
    html = (results.folder.path / "report.html").read_text()
    assert "Amount of data" in html and "Every map" in html


def test_a_stopped_run_goes_on_with_its_maps(target, tmp_path) -> None:
    def experiment(left: float) -> Experiment:
        return Experiment(reader=target, metrics=[Stopping(left)], method=ONE, **FIELDS)

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        experiment(1).run(folder)
    (file,) = (folder / "artifacts").glob("map-*.safetensors")
    before = file.stat().st_mtime_ns
    stopped = experiment(9).run(folder)
    assert file.stat().st_mtime_ns == before
    whole = experiment(9).run(tmp_path / "other")
    assert [row["digest"] for row in stopped.rows] == [row["digest"] for row in whole.rows]
    assert len({row["digest"] for row in whole.rows}) == 4


def test_text_encoders_are_stitched_too(target, tmp_path) -> None:
    method = ONE | {"sites": ["text_encoder"], "controls": ["mean_ablated"]}
    fields = FIELDS | {"name": "texts"}
    found = Experiment(reader=target, metrics=[Stopping()], method=method, **fields)
    results = found.run(tmp_path / "run")
    digests = [row["digest"] for row in results.rows]
    assert len(set(digests)) >= 5 and not set(digests[:2]) & set(digests[2:])
    lines = [line for unit in results.folder.firing() for line in unit]
    assert {line["site"] for line in lines} == {"text_encoder"}
    assert all(line["branches"] == ["cond", "uncond"] for line in lines)


def test_a_random_map_keeps_means_and_the_whole_variance() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(400, 5, generator=draw) * torch.arange(1, 6) + 3
    y = torch.randn(400, 7, generator=draw) * 2 - 1
    own = random_map(PairedRows(x, y))
    z = own.apply(x)
    torch.testing.assert_close(z.mean(0), y.mean(0), atol=1e-4, rtol=1e-4)
    assert float(z.var(0).sum()) == pytest.approx(float(y.var(0).sum()), rel=1e-4)
    assert isinstance(own, AffineMap) and own == random_map(PairedRows(x, y))
    assert own != random_map(PairedRows(x, y), seed=1)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("stitch-*.yaml")), ids=lambda path: path.stem)
def test_examples_are_specs_whose_sets_share_no_scene(path: Path) -> None:
    spec = load_spec(path)
    method: Any = spec.method
    one, other = spec.data.scenes, method.fit.scenes
    assert method.kind == "stitch"
    if one is None:
        fitted, drawn = (
            {item.prompt for item in read_items(data)}
            for data in (
                method.fit.model_copy(update={"file": EXAMPLES / method.fit.file}),
                spec.data,
            )
        )
        assert len(fitted) > len(drawn) > 0 and not fitted & drawn
        return
    assert one.seed == other.seed
    assert other.skip >= one.skip + one.count


CASES: list[tuple[dict[str, Any], str]] = [
    ({"amounts": [4]}, "4 prompts are asked for, fit has 4, of which 3 are not held out"),
    ({"fit": {"scenes": {"count": 1}}}, "1 prompts leave none to fit to"),
    ({"sites": ["unet.up_blocks.*"]}, "stands for 4 sites; name each pair"),
    ({"sites": ["unet.mid_block", "text_encoder"]}, "some sites are in the denoiser and some are"),
    ({"sites": [SITE, SITE]}, "sites: unet.up_blocks.1 is there twice"),
    ({"maps": ["ridge", "ridge"]}, "maps: ridge is there twice"),
    ({"maps": ["rigde"]}, "ridge"),
    ({"align": "spans"}, "method.align: spans are of language models"),
    ({"skip": 1}, "method.skip: is of texts of language models"),
    ({"source_pipeline": {"num_inference_steps": 3}}, "called 3 times, the target's 2 times"),
    (
        {"maps": [{"method": "ridge", "options": {"k": 3}}]},
        "method.maps.0.options: unknown option of ridge 'k'; nearest: lambdas",
    ),
    ({"maps": [{"method": "mlp", "options": {"recipe": {"ephocs": 1}}}]}, "field of a recipe"),
    ({"maps": [{"method": "mlp", "options": {"recipe": 1}}]}, "recipe is .* or a mapping of"),
    (
        {"maps": [{"method": "noise", "options": {"degree": -1}}]},
        "method.maps.0.options: noise: degree is a whole number from 0, got -1",
    ),
]


@pytest.mark.parametrize(("changes", "text"), CASES, ids=[text[:30] for _, text in CASES])
def test_what_cannot_be_stitched_is_refused(target, tmp_path, changes, text) -> None:
    with pytest.raises((InvalidInput, UnknownName), match=text):
        Experiment(reader=target, metrics=[Stopping()], method=ONE | changes, **FIELDS).run(
            tmp_path / "run"
        )


def test_language_models_and_unknown_sites_are_refused(target, language) -> None:
    with pytest.raises(InvalidInput, match="shapes-unet is a pipeline and the subject .* a langua"):
        Experiment(
            reader=language, metrics=[Stopping()], method=ONE,
            **(FIELDS | {"data": {"prompts": ["a"]}, "pipeline": {}}),
        ).plan()  # fmt: skip
    with pytest.raises(UnknownName, match="unet.up_blocks"):
        Experiment(
            reader=target, metrics=[Stopping()], method=ONE | {"sites": ["unet.up_block.1"]},
            **FIELDS,
        ).plan()  # fmt: skip
