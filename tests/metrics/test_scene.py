"""Whether pictures show what their captions say."""

import random
from typing import Any

import pytest
import torch

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.metrics import Outputs, build
from dreamreader.zoo import scenes

SAID = {
    "source_color": "red", "source_shape": "star", "source_size": "large",
    "source_place": "middle center", "source_background": "white", "source_frame": "no",
}  # fmt: skip


def pictures(**changes: Any) -> torch.Tensor:
    """A large red star in the middle, or with something else."""
    own = {"shape": "star", "color": "red", "size": "large", "row": "middle", "column": "center"}
    obj = scenes.Obj(**{k: changes.pop(k, v) for k, v in own.items()})  # pyright: ignore
    more = changes.pop("objects", ())
    scene = scenes.Scene((obj, *more), changes.pop("background", "white"), **changes)
    image = scenes.render(scene, random.Random(0))
    values = torch.tensor(list(image.tobytes())).reshape(64, 64, 3)
    return values.permute(2, 0, 1)[None] / 255


def measure(image: torch.Tensor, said: Any = SAID, **options: Any) -> dict[str, Any]:
    spec = {"scene": options} if options else "scene"
    return {k: v[0] for k, v in build(spec).measure(Outputs([said], image), None).items()}


def test_every_attribute_is_compared_with_its_column() -> None:
    right = measure(pictures())
    assert right == dict.fromkeys(right, True) and len(right) == 7
    for name, changes in {
        "color": {"color": "blue"},
        "shape": {"shape": "circle"},
        "size": {"size": "small"},
        "background": {"background": "black"},
        "frame": {"frame": True},
    }.items():
        found = measure(pictures(**changes))
        assert not found[f"{name}_right"] and not found["scene_right"]
    two = scenes.Obj("circle", "blue", "small", "top", "left")
    found = measure(pictures(size="small", objects=(two,)), {**SAID, "source_size": "small"})
    assert not found["scene_right"]


def test_attributes_can_be_chosen() -> None:
    found = measure(pictures(color="blue"), attributes=["shape", "size"])
    assert found == {"shape_right": True, "size_right": True, "scene_right": True}


def test_what_has_no_right_value_is_refused() -> None:
    with pytest.raises(InvalidInput, match="row 0 has no column 'source_frame'"):
        measure(pictures(), {k: v for k, v in SAID.items() if k != "source_frame"})
    with pytest.raises(UnknownName, match="color"):
        build({"scene": {"attributes": ["colour"]}})
    with pytest.raises(InvalidInput, match="attributes are a list of some, got 'color'"):
        build({"scene": {"attributes": "color"}})
