"""Edits as written, swept."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dreamreader.edits import Ablate, Clamp, Scale, Steer
from dreamreader.engine._selection import Box
from dreamreader.errors import InvalidInput
from dreamreader.experiments.row import Row

from ..conftest import MIDDLE

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}


def edits_of(made: Any, **values: Any) -> tuple[list[Any], list[Row]]:
    """Edits of all rows as one batch, and the rows."""
    made.job.use_batch(100)
    return made.spec.method.edits_of(made.job, made.job.rows), made.job.rows


def method(*edits: dict[str, Any], **sweep: list[Any]) -> dict[str, Any]:
    return {"kind": "edit", "edits": list(edits), "sweep": sweep}


def test_every_kind_of_edit(experiment, reader) -> None:
    values = [0.5, *[0.0] * 95]
    common = {"site": MIDDLE, "branch": "cond"}
    made = experiment(
        data={"prompts": ["a red circle"]},
        method=method(
            {
                **common,
                "kind": "steer",
                "direction": {"values": values},
                "alpha": 2,
                "norm_match": True,
                "steps": [0, 2],
            },
            {**common, "kind": "ablate", "ablation": "noise", "sigma": 0.5, "fraction": [0, 0.5]},
            {**common, "kind": "scale", "factor": 3, "tokens": {"box": [0, 0, 0.5, 1]}},
            {**common, "kind": "clamp", "low": -1, "tokens": [0, 1], "steps": 1},
            {"kind": "scale", "site": f"{MIDDLE}:heads", "factor": 0, "heads": [1]},
        ),
    )
    found, rows = edits_of(made)
    assert [row.condition for row in rows] == ["unedited", "edited"]
    more: dict[str, Any] = {"branch": "cond", "rows": [1]}
    direction = torch.tensor(values)
    assert found == [
        Steer(MIDDLE, direction, 2.0, norm_match=True, steps=range(0, 2), **more),
        Ablate(MIDDLE, "noise", sigma=0.5, fraction=(0.0, 0.5), **more),
        Scale(MIDDLE, 3.0, tokens=Box(0, 0, 0.5, 1), **more),
        Clamp(MIDDLE, -1.0, None, tokens=[0, 1], steps=1, **more),
        Scale(f"{MIDDLE}:heads", 0.0, heads=[1], rows=[1]),
    ]


def test_rows_of_a_sweep_are_what_single_runs_give(experiment, reader, tmp_path) -> None:
    made = experiment(
        method=method(
            {"kind": "scale", "site": "$site", "factor": "$factor", "steps": "$when"},
            site=["unet.mid_block", MIDDLE],
            factor=[0.0, 2.0],
            when=[[0, 1], 1],
        ),
        batch={"rows": 7},
    )
    results = made.run(tmp_path / "run")
    assert len(results.of("edited")) == 2 * 2 * 2 * 2
    assert {row["when"] for row in results.of("edited")} == {"[0, 1]", "1"}
    row = results.of("edited", site=MIDDLE, factor=2.0, when="[0, 1]", item="1")[0]
    edit = Scale(MIDDLE, 2.0, steps=0)
    with torch.inference_mode():
        alone = reader.run("a blue square", edits=edit, seeds=[0], **SETTINGS).images[0]
        plain = reader.run("a blue square", seeds=[0], **SETTINGS).images[0]
    image = torch.tensor(list(results.image(row).tobytes())).reshape(64, 64, 3).permute(2, 0, 1)
    assert (image / 255 - alone).abs().max() < 2 / 255
    expected = float((alone - plain).square().mean().sqrt())
    assert row["pixel_distance"] == pytest.approx(expected, rel=0.02)


def test_axes_keep_numbers_and_say_the_rest_as_text(experiment) -> None:
    edit = {"kind": "scale", "site": "unet.mid_block", "factor": "$a", "fraction": "$b"}
    made = experiment(method=method(edit, a=[1, 0.5], b=[[0, 0.5], [0.5, 1]]))
    found, rows = edits_of(made)
    points = [dict(row.axes) for row in rows if row.condition == "edited"][::2]
    assert points == [{"a": a, "b": b} for a in (1, 0.5) for b in ("[0, 0.5]", "[0.5, 1]")]
    assert [(e.factor, e.fraction, e.rows) for e in found] == [
        (1.0, (0, 0.5), [2, 3]),
        (1.0, (0.5, 1), [4, 5]),
        (0.5, (0, 0.5), [6, 7]),
        (0.5, (0.5, 1), [8, 9]),
    ]


def test_directions_of_files_and_random_ones(experiment, tmp_path) -> None:
    sites = experiment().job.reader.sites("unet.mid_block.**.attn*").names
    path = tmp_path / "d.safetensors"
    save_file({name: torch.randn(96) for name in sites}, path)
    edits = [
        {"kind": "steer", "site": "unet.mid_block.**.attn*", "direction": each}
        for each in ({"file": str(path)}, {"random": 3, "norm": 2.0}, {"random": 4})
    ]
    found, _ = edits_of(experiment(method=method(*edits)))
    kept, first, second = (edit.direction for edit in found)
    assert set(kept) == set(first) == set(sites)
    for site in sites:
        assert first[site].norm() == pytest.approx(2) and second[site].norm() == pytest.approx(1)
    assert not torch.equal(first[sites[0]], first[sites[1]])
    again, _ = edits_of(experiment(method=method(*edits)))
    assert all(torch.equal(again[1].direction[site], first[site]) for site in sites)


@pytest.mark.parametrize(
    "edit, text",
    [
        ({"direction": {"file": "none"}}, "direction file none: "),
        ({"direction": {"random": 1, "values": [1]}}, "give one of file, random and values, got"),
        ({"direction": {}}, "give one of file, random and values, got none"),
        ({"direction": {"random": 1}, "alpha": "$a"}, "sweep.a: alpha needs numbers, got 'x'"),
        ({"direction": {"random": 1}, "alpha": "x"}, "method.edits.0.alpha: .* got 'x'"),
        ({"direction": {"random": 1}, "tokens": {"bx": [0]}}, "bx: unknown field; nearest: box"),
    ],
)
def test_edits_that_cannot_be(experiment, tmp_path, edit, text) -> None:
    whole = {"kind": "steer", "site": MIDDLE, **edit}
    sweep = {"a": ["x"]} if "alpha" in edit else {}
    with pytest.raises(InvalidInput, match=text):
        experiment(method=method(whole, **sweep)).run(tmp_path / "run")


def test_axes_that_go_together(experiment) -> None:
    edit = {"kind": "scale", "site": "$site", "factor": "$factor"}
    sites = [[MIDDLE], ["unet.mid_block", MIDDLE], [MIDDLE]]
    together = {**method(edit, site=sites, factor=[2.0, 2.0, 0.5]), "combine": "zip"}
    made = experiment(method=together)
    found, rows = edits_of(made)
    assert [(e.sites, e.factor, e.rows) for e in found] == [
        ((MIDDLE,), 2.0, [2, 3]),
        (("unet.mid_block", MIDDLE), 2.0, [4, 5]),
        ((MIDDLE,), 0.5, [6, 7]),
    ]
    assert len(rows) == 8


@pytest.mark.parametrize(
    "axes, text",
    [
        ({"site": [MIDDLE], "factor": [1.0, 2.0]}, "zip needs axes of one length, got {'site': 1"),
        ({"site": [MIDDLE] * 2, "factor": [1.0, 1.0]}, "sweep has a combination twice"),
    ],
)
def test_axes_that_cannot_go_together(experiment, axes, text) -> None:
    edit = {"kind": "scale", "site": "$site", "factor": "$factor"}
    with pytest.raises(InvalidInput, match=text):
        experiment(method={**method(edit, **axes), "combine": "zip"})


def test_a_direction_for_each_step_is_projected_out(experiment, tmp_path) -> None:
    path = tmp_path / "d.safetensors"
    vectors = torch.randn(2, 96)
    save_file({MIDDLE: vectors}, path)
    edit = {"kind": "ablate", "ablation": "project", "site": MIDDLE, "per_step": True}
    found, _ = edits_of(experiment(method=method({**edit, "direction": {"file": str(path)}})))
    assert found[0].per_step and torch.equal(found[0].direction[MIDDLE], vectors)
