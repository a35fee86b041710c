"""Detector, tint and distances on rendered scenes, where the truth is known."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.metrics import Outputs, build
from dreamreader.zoo import scenes


def scene(
    color: str = "red", shape: str = "circle", place: str = "top left", size: str = "large",
 background: str = "white", frame: bool = False, more: int = 0,
) -> Tensor:  # fmt: skip
    found = [scenes.Obj(shape, color, size, *place.split())]
    found += [scenes.Obj("square", "green", "small", "bottom", "right")] * more
    picture = scenes.render(scenes.Scene(tuple(found), background, frame))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def outputs(images: list[Tensor], **columns: list[Any]) -> Outputs:
    rows = [{name: each[i] for name, each in columns.items()} for i in range(len(images))]
    return Outputs(rows, images=torch.stack(images))


BLANK = torch.full((3, 64, 64), 0.96)


def test_detector_reads_what_was_drawn() -> None:
    drawn = [
        {"color": "red", "shape": "star", "place": "top right", "size": "large"},
        {"color": "cyan", "shape": "cross", "place": "middle center", "size": "small"},
    ]
    rest: list[dict[str, Any]] = [
        {"background": "black", "frame": True},
        {"background": "gray", "frame": False},
    ]
    images = [scene(**a, **b) for a, b in zip(drawn, rest, strict=True)]
    found = build({"detector": {"kept": False}}).measure(outputs([*images, BLANK]), None)
    for name in (*drawn[0], *rest[0]):
        truth = [{**a, **b}[name] for a, b in zip(drawn, rest, strict=True)]
        assert found[name][:2] == truth, name
    assert found["objects"] == [1, 1, 0]
    assert found["color"][2] is None and found["background"][2] == "white"
    assert found["turned"] == [None] * 3 and "color_kept" not in found


def test_turned_and_kept() -> None:
    before = [scene()] * 8
    after = [
        scene("blue"),
        scene(shape="star"),
        scene(place="bottom left"),
        scene(size="small"),
        scene(background="black"),
        scene(frame=True),
        scene(more=1),
        BLANK,
    ]
    targets = ["blue", "star", "middle left", "small", "black", None, "red", "blue"]
    reference = outputs(before)
    found = build("detector").measure(outputs(after, target=targets), reference)
    assert found["turned"] == [True, True, False, True, True, None, True, False]
    assert found["color_kept"] == [False, True, True, True, True, True, True, False]
    assert found["shape_kept"] == [True, False, True, True, True, True, True, False]
    assert found["place_kept"] == [True, True, False, True, True, True, True, False]
    assert found["rest_kept"] == [True, True, True, False, False, False, False, False]
    assert found["objects"][6] == 2


def test_a_target_can_be_the_frame_or_several_values() -> None:
    before = [scene(), scene(frame=True), scene(), scene(), scene(), scene()]
    after = [
        scene(frame=True),
        scene(),
        scene("blue", background="black"),
        scene("blue"),
        scene("blue", size="small"),
        BLANK,
    ]
    targets = ["yes", "no", "blue + black", "blue + black", "blue", "yes"]
    found = build("detector").measure(outputs(after, target=targets), outputs(before))
    assert found["turned"] == [True, True, True, False, True, False]
    assert found["others_kept"] == [True, True, True, True, False, False]
    with pytest.raises(UnknownName, match="unknown target 'mauve'"):
        build("detector").measure(outputs([scene()], target=["blue + mauve"]), outputs([scene()]))


def test_another_column_can_hold_the_target() -> None:
    got = outputs([scene("blue")] * 2, wanted=["blue", "red"])
    found = build({"detector": {"target": "wanted", "kept": False}}).measure(got, None)
    assert found["turned"] == [True, False]


def test_tint_is_the_share_of_the_way() -> None:
    red, blue = scene("red"), scene("blue")
    inside = (red - blue).abs().sum(0) > 0.05
    mixed = [red + share * (blue - red) for share in (0.0, 0.25, 0.5, 1.0)]
    elsewhere = torch.where(inside, red, torch.zeros(()))  # the place around it does not count
    got = outputs([*mixed, elsewhere, red], source=["red"] * 6, target=["blue"] * 6)
    found = build("tint").measure(got, outputs([red] * 5 + [BLANK]))["tint"]
    assert found[5] is None
    assert found[:4] == pytest.approx([0.0, 0.25, 0.5, 1.0], abs=0.03)
    assert found[4] == pytest.approx(found[0], abs=0.03)
    options = build({"tint": {"source": "blue", "target": "red"}})
    assert options.measure(outputs([blue]), outputs([red]))["tint"] == pytest.approx(
        [0.0], abs=0.03
    )


def test_shape_margin_tells_which_shape_fits_better() -> None:
    rows = {"source": ["square"] * 4, "target": ["star"] * 4}
    star, square = scene(shape="star"), scene(shape="square")
    between = torch.where((scene(shape="star") - scene()).abs().sum(0) > 0, star, square)
    found = build("shape_margin").measure(outputs([square, star, between, BLANK], **rows), None)
    low, high, middle, nothing = found["shape_margin"]
    assert nothing is None and low < -0.2 and high > 0.2 and low <= middle <= high
    turned = build({"shape_margin": {"source": "star", "target": "square"}})
    assert turned.measure(outputs([square]), None)["shape_margin"] == pytest.approx([-low])


def test_shape_margin_refuses_what_is_no_shape() -> None:
    with pytest.raises(UnknownName, match="unknown shape 'blue'"):
        build({"shape_margin": {"source": "blue"}})
    with pytest.raises(InvalidInput, match="source and target are both star"):
        build({"shape_margin": {"source": "star", "target": "star"}})
    with pytest.raises(InvalidInput, match="no column 'source' with a shape"):
        build("shape_margin").measure(outputs([scene()], prompt=["a"]), None)


def test_distances_against_the_formula() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 4, 3, 8, 8, generator=rng).unbind()
    rows: list[dict[str, Any]] = [{}] * 4
    flat = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8), a[2], b[3]])
    found = build("pixel_distance").measure(
        Outputs(rows, images=flat), Outputs(rows, images=torch.zeros(4, 3, 8, 8))
    )["pixel_distance"]
    truth = [0.0, 1.0, (a[2] ** 2).mean() ** 0.5, (b[3] ** 2).mean() ** 0.5]
    assert found == pytest.approx([float(each) for each in truth], rel=1e-6)

    latents = build("latent_distance").measure(
        Outputs(rows, latents=a), Outputs(rows, latents=torch.cat([b[:3], torch.zeros(1, 3, 8, 8)]))
    )["latent_distance"]
    assert latents[:3] == pytest.approx(
        [float((a[i] - b[i]).norm() / b[i].norm()) for i in range(3)]
    )
    assert latents[3] is None

    steps = {0: a, 2: b}, {0: b, 2: b, 5: a}
    noise = build("noise_distance").measure(
        Outputs(rows, noise=steps[0]), Outputs(rows, noise=steps[1])
    )
    assert list(noise) == ["noise_distance", "noise_distance_0", "noise_distance_2"]
    first = [float((a[i] - b[i]).norm() / b[i].norm()) for i in range(4)]
    assert noise["noise_distance_0"] == pytest.approx(first)
    assert noise["noise_distance_2"] == [0.0] * 4
    assert noise["noise_distance"] == pytest.approx([each / 2 for each in first])
    only = build({"noise_distance": {"steps": [2]}})
    assert list(only.measure(Outputs(rows, noise=steps[0]), Outputs(rows, noise=steps[1]))) == [
        "noise_distance",
        "noise_distance_2",
    ]


PICTURE = [scene()]
ROWS: list[dict[str, Any]] = [{}]


@pytest.mark.parametrize(
    "spec, got, reference, error, text",
    [
        ("detector", outputs(PICTURE, target=["blau"]), outputs(PICTURE), UnknownName,
         "unknown target 'blau'; nearest: blue"),
        ("detector", Outputs(ROWS), None, InvalidInput, "needs images; the outputs have none"),
        ("detector", outputs(PICTURE), None, InvalidInput, "detector compares with the reference"),
        ("tint", outputs(PICTURE), outputs(PICTURE), InvalidInput, "no column 'source' with"),
        ("tint", outputs(PICTURE, source=["red"], target=["bluu"]), outputs(PICTURE), UnknownName,
         "unknown colour 'bluu'; nearest: blue"),
        ("pixel_distance", outputs(PICTURE), Outputs(ROWS, images=torch.zeros(1, 3, 8, 8)),
         InvalidInput, r"images are \[1, 3, 64, 64\], those of the reference \[1, 3, 8, 8\]"),
        ("latent_distance", Outputs(ROWS, latents=torch.zeros(1, 2)), outputs(PICTURE),
         InvalidInput, "latent_distance needs latents; the outputs have images"),
        ("noise_distance", Outputs(ROWS, noise={0: torch.zeros(1, 2)}),
         Outputs(ROWS, noise={1: torch.zeros(1, 2)}), InvalidInput,
         "the reference outputs lack step 0; they have 1"),
        ("noise_distance", Outputs(ROWS), Outputs(ROWS), InvalidInput, "needs noise"),
        ("noise_distance", Outputs(ROWS, noise={0: torch.zeros(1, 2)}),
         Outputs(ROWS, noise={0: torch.zeros(1, 3)}), InvalidInput,
         r"step 0 is \[1, 2\], .* \[1, 3\]"),
    ],
)  # fmt: skip
def test_wrong_inputs_say_what_is_wrong(
    spec: Any, got: Outputs, reference: Outputs | None, error: type, text: str
) -> None:
    with pytest.raises(error, match=text):
        build(spec).measure(got, reference)
