"""Specs of harvests: what they say, and what is said about those that are wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dreamreader.engine._selection import Box
from dreamreader.errors import InvalidInput
from dreamreader.harvest import Harvest, Spec
from dreamreader.specs.load import check_spec, load_spec

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "harvest").glob("*.yaml"))
WHOLE = {"name": "x", "subject": "shapes-unet", "data": {"prompts": ["a"]}}


def spec(**capture: Any) -> Spec:
    return check_spec(Spec, {**WHOLE, "capture": [{"sites": "unet.mid_block", **capture}]})


def test_defaults() -> None:
    found = spec()
    assert found.capture[0].selection == dict.fromkeys(
        ("steps", "timesteps", "sigmas", "fraction", "branch", "tokens")
    )
    assert found.capture[0].stored(torch.float32) == torch.bfloat16
    assert (found.store.unit, found.store.pressure, found.store.not_finite) == (
        *("auto", "block", "refuse"),
    )


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("all", None),
        ("dog", "dog"),
        (3, 3),
        ([0, -1], [0, -1]),
        ({"every": 4}, slice(None, None, 4)),
        ({"random": 0.25}, None),
        ({"random": 16}, None),
        ({"budget": 100}, None),
        ({"box": [0, 0, 0.5, 1]}, Box(0, 0, 0.5, 1)),
    ],
    ids=str,
)
def test_tokens(tokens: Any, expected: Any) -> None:
    assert spec(tokens=tokens).capture[0].selection["tokens"] == expected


def test_times_and_dtypes() -> None:
    found = spec(steps=[2, 5], fraction=[0, 0.5], sigmas=[1, 3], dtype="model").capture[0]
    assert found.selection["steps"] == range(2, 5) and found.selection["sigmas"] == (1.0, 3.0)
    assert found.stored(torch.float16) == torch.float16
    assert spec(steps=3, dtype="int8").capture[0].stored(torch.float32) == torch.int8


@pytest.mark.parametrize(
    ("capture", "text"),
    [
        ({"sites": []}, "capture.0.sites: is empty"),
        ({"steps": [5, 2]}, "capture.0.steps: needs 0 <= start < stop, got [5, 2]"),
        ({"dtype": "float64"}, "capture.0.dtype: input should be 'model', 'float32', 'bfloat16'"),
        ({"pool": "sum"}, "capture.0.pool: input should be 'none', 'mean' or 'max', got 'sum'"),
        ({"stepz": 1}, "capture.0.stepz: unknown field; nearest: steps"),
        ({"tokens": {"random": 0}}, "capture.0.tokens.random: input should be greater than"),
        ({"tokens": {"random": 1.5}}, "capture.0.tokens.random: "),
        ({"tokens": {"randm": 3}}, "capture.0.tokens.randm: unknown field; nearest: random"),
        ({"tokens": {"random": 3, "every": 2}}, "give one of every, random, budget and box, got ["),
    ],
    ids=str,
)
def test_a_capture_that_cannot_be_right(capture: Any, text: str) -> None:
    with pytest.raises(InvalidInput) as error:
        spec(**capture)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "Harvest: capture: field required"),
        ({"capture": []}, "capture: list should have at least 1 item"),
        ({"store": {"unit": 0}}, "store.unit: "),
        ({"store": {"pressure": "drop"}}, "store.pressure: input should be 'block' or 'sample'"),
        ({"data": {"pairs": [{"source": "a", "target": "b"}]}}, "data.pairs: a harvest runs promp"),
    ],
    ids=str,
)
def test_a_spec_that_cannot_be_right(fields: Any, text: str) -> None:
    capture = {} if not fields or "capture" in fields else {"capture": [{"sites": "x"}]}
    with pytest.raises(InvalidInput) as error:
        Harvest(WHOLE | capture | fields)
    assert text in str(error.value)


def test_a_whole_spec_and_fields_beside_it() -> None:
    with pytest.raises(InvalidInput, match="a whole spec is given, and seeds beside it"):
        Harvest(spec(), seeds={"count": 3})
    assert repr(Harvest(spec())) == "Harvest('x': 1 captures of shapes-unet)"


def test_examples_are_specs_and_take_overrides() -> None:
    assert [path.stem for path in EXAMPLES] == ["attention", "language", "pair"]
    for path in EXAMPLES:
        assert load_spec(Spec, path, ["store.unit=7"]).store.unit == 7
