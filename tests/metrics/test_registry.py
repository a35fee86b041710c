"""Metrics by name, options, functions of one's own, and those of installed packages."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dreamreader import metrics
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.metrics import Outputs, build, register, registry
from dreamreader.metrics.base import FIELDS


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_OWN", {})


def outputs(count: int = 3, **fields: Any) -> Outputs:
    return Outputs([{"prompt": f"row {i}"} for i in range(count)], **fields)


def test_every_built_in_metric_is_what_its_name_says() -> None:
    given: dict[str, dict[str, Any]] = {
        "clip_score": {"path": "x"},
        "lpips": {"weights": "x"},
        "matches": {"pattern": "("},
    }
    for name, kind in registry._BUILT_IN.items():
        assert name in metrics.names()
        if name in given:
            with pytest.raises(InvalidInput, match=name):
                build({name: given[name]})
            continue
        metric = build(name)
        assert metric.name == name and type(metric).__name__ == kind
        assert metric.needs and metric.needs <= set(FIELDS)


@pytest.mark.parametrize(
    "spec, error, text",
    [
        ("detecter", UnknownName, "unknown metric 'detecter'; nearest: detector"),
        ({"detector": {"tarjet": "a"}}, UnknownName, "of metric detector 'tarjet'; nearest: targ"),
        ({"pixel_distance": {"a": 1}}, UnknownName, "of metric pixel_distance 'a'.*takes none"),
        ("clip_score", InvalidInput, "metric clip_score needs the option path"),
        ({"a": {}, "b": {}}, InvalidInput, "a metric is a name, or .*, got .*'b'"),
        ({"detector": ["a"]}, InvalidInput, "a metric is a name, or"),
        (3, InvalidInput, "a metric is a name, or .* got 3"),
        ({"detector": {"kept": "yes"}}, InvalidInput, "kept true or false, got .* 'yes'"),
        ({"noise_distance": {"steps": "3"}}, InvalidInput, "steps must be whole numbers, got '3'"),
        ({"noise_distance": {"steps": [-1]}}, InvalidInput, r"must be whole numbers, got \[-1\]"),
        ({"tint": {"source": "redd"}}, UnknownName, "unknown colour 'redd'; nearest: red"),
        ({"tint": {"source": "red", "target": "red"}}, InvalidInput, "are both red"),
    ],
)  # fmt: skip
def test_a_wrong_spec_says_what_is_wrong(spec: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        build(spec)


def test_options_reach_the_metric() -> None:
    assert build({"detector": {"target": "wanted"}}).target == "wanted"  # type: ignore[attr-defined]
    assert build({"detector": None}) == build("detector")
    assert not build({"detector": {"kept": False}}).compares and build("detector").compares


def test_a_function_of_ones_own() -> None:
    register("brightness", lambda got: got.images.mean((1, 2, 3)), needs="images")
    register("gap", lambda got, ref: {"gap": (got.latents - ref.latents).sum(1)},
             needs={"latents"}, compares=True)  # fmt: skip
    assert {"brightness", "gap", "detector"} <= set(metrics.names())
    bright = build("brightness")
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.5, 1.0)])
    assert bright.measure(outputs(images=images), None) == {"brightness": [0.0, 0.5, 1.0]}
    assert not bright.compares and bright.needs == {"images"}
    gap = build("gap")
    a, b = outputs(latents=torch.ones(3, 2)), outputs(latents=torch.zeros(3, 2))
    assert gap.compares and gap.measure(a, b) == {"gap": [2.0, 2.0, 2.0]}
    with pytest.raises(InvalidInput, match="gap compares with the reference outputs"):
        gap.measure(a, None)
    with pytest.raises(InvalidInput, match="brightness needs images; the outputs have latents"):
        bright.measure(a, None)
    with pytest.raises(UnknownName, match="option of metric brightness 'x'"):
        build({"brightness": {"x": 1}})


@pytest.mark.parametrize(
    "values, text",
    [
        ([1.0], "mine has 1 values for 3 rows"),
        (2.0, "mine is float, not one value for each row"),
        ("abc", "mine is str, not one value"),
        ([1, 2, [3]], "mine holds list; a value is a number"),
        (torch.zeros(3, 1), "mine holds list"),
    ],
)
def test_a_function_must_give_one_value_for_each_row(values: Any, text: str) -> None:
    register("mine", lambda got: values, needs=set())
    with pytest.raises(InvalidInput, match=text):
        build("mine").measure(outputs(), None)


def test_a_factory_of_ones_own_takes_options() -> None:
    class Above:
        name, needs, compares = "above", frozenset({"images"}), False

        def __init__(self, limit: float, channel: int = 0):
            self.limit, self.channel = limit, channel

        def measure(self, got: Outputs, reference: Outputs | None) -> dict[str, list[bool]]:
            assert got.images is not None
            return {"above": (got.images[:, self.channel].amax((1, 2)) > self.limit).tolist()}

    register("above", Above)
    images = torch.rand(3, 3, 2, 2) * 0.5
    images[1, 0, 0, 0] = 0.9
    found = build({"above": {"limit": 0.6}}).measure(outputs(images=images), None)
    assert found == {"above": [False, True, False]}
    with pytest.raises(InvalidInput, match="above needs the option limit"):
        build("above")
    with pytest.raises(UnknownName, match="'limits'; nearest: limit"):
        build({"above": {"limits": 1}})


def test_what_cannot_be_registered() -> None:
    with pytest.raises(InvalidInput, match="'detector' is built in"):
        register("detector", lambda: None)
    with pytest.raises(InvalidInput, match="the factory is int, no function"):
        register("mine", 3)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="field of outputs 'image'; nearest: images"):
        register("mine", lambda got: [], needs="image")
    register("mine", lambda: 3)
    with pytest.raises(InvalidInput, match="gave int without name; .* registered with needs="):
        build("mine")


def test_an_installed_package_brings_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "some_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dreamreader.metrics]\nlength = some_package_metrics:Length\n"
    )
    (tmp_path / "some_package_metrics.py").write_text(
        "class Length:\n"
        "    name, needs, compares = 'length', frozenset({'text'}), False\n"
        "    def measure(self, got, reference):\n"
        "        return {'length': [len(each) for each in got.text]}\n"
    )
    assert "length" not in metrics.names()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "length" in metrics.names()
    assert build("length").measure(outputs(2, text=["abc", ""]), None) == {"length": [3, 0]}


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"images": torch.zeros(2, 3, 4, 4)}, "images has 2 entries for 3 rows"),
        ({"images": torch.zeros(3, 4, 4)}, r"images must be \[n, 3, h, w\], got \[3, 4, 4\]"),
        ({"text": ["a"]}, "text has 1 entries for 3 rows"),
        ({"noise": {7: torch.zeros(4, 1)}}, "noise of step 7 has 4 entries for 3 rows"),
    ],
)
def test_outputs_have_one_entry_for_each_row(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        outputs(**fields)
