"""Edits in files: equal after a round trip, and refused where a file cannot hold them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dreamreader import edits
from dreamreader.edits import Ablate, Box, Clamp, Edit, Patch, Scale, Steer
from dreamreader.engine import Activation, Cache, Row
from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.errors import InvalidInput

V = torch.randn(4)
ACTIVATION = Activation(
    "unet.mid_block",
    torch.randn(2, 1, 3, 4, dtype=torch.bfloat16),
    (Row(0, "a cat", 3), Row(1)),
    ("cond",),
    (StepInfo(2, 801.0, None, 0.25, 0),),
    (1, 3),
)
ALL = [
    Steer("unet.a", V, [0.0, 1.5], norm_match=True, steps=slice(1, 5), branch=("cond", "uncond")),
    Steer(["unet.a", "unet.b"], {"unet.a": V, "unet.b": V.half()}, torch.tensor([1.0, 2.0])),
    Ablate(
        "unet.**.attn2:heads", "project", direction=torch.randn(2, 4), heads=[1, 2], rows=range(3)
    ),
    Steer("unet.a", V, gate={"unet.a": V * 2}, norm_match=True),
    Ablate("unet.a", "project", direction=torch.ones(3, 4), per_step=True, norm_match=True),
    Ablate("unet.a", "mean", source=ACTIVATION, timesteps={999.0, 1.5}),
    Ablate("unet.a", "noise", sigma=0.5, seed=7, sigmas=(0.5, 1.5)),
    Scale("unet.a", -2.0, tokens=Box(0, 0, 0.5, 1), fraction=slice(0.5, None)),
    Scale("unet.a", 3, tokens="red", channels=torch.tensor([True, False])),
    Clamp("unet.a", -1.0, direction=V, strength=[0.1, 0.2]),
    Patch("unet.mid_block", Cache([ACTIVATION]), from_rows=[1, 0]),
    Patch("unet.a", 2, steps=range(2, 9, 3), rows=torch.tensor([True, False])),
    Patch(
        "lm.h.0",
        Activation(
            "lm.h.0",
            V.reshape(1, 1, 1, 4),
            (Row(0),),
            ("cond",),
            (StepInfo(0, float("nan"), None, float("nan"), 0),),
        ),
    ),
]


def test_edits_come_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "edits.safetensors"
    edits.save(path, ALL)
    found = edits.load(path)
    assert found == ALL
    assert [type(each) for each in found] == [type(each) for each in ALL]
    assert list(tmp_path.iterdir()) == [path]


def test_one_edit_is_a_list_of_one(tmp_path: Path) -> None:
    edits.save(tmp_path / "one", ALL[0])
    assert edits.load(tmp_path / "one") == ALL[:1]


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (Edit("unet.a", lambda x: x), "a function cannot be saved; kinds: Steer"),
        (Scale("unet.a", steps=lambda step: True), "steps cannot be saved: function"),
    ],
)
def test_functions_are_refused_and_nothing_is_written(tmp_path: Path, edit: Any, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        edits.save(tmp_path / "x", [ALL[0], edit])
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InvalidInput, match="holds no edits of dreamreader"):
        edits.load(path)
    edits.save(path, ALL)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match="no safetensors file, or only a part of one"):
        edits.load(path)
    with pytest.raises(FileNotFoundError, match="missing: no such file; nearest in"):
        edits.load(tmp_path / "missing")
