"""Maps: what they give, directions, inverses, files, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from dreamreader.artifacts import load
from dreamreader.errors import InvalidInput
from dreamreader.mapping import (
    ActivationMap,
    AffineMap,
    LocalMap,
    MapCard,
    MLPMap,
    NoiseConditionedMap,
    StepMaps,
)


def affine(d_source: int = 4, d_target: int = 3) -> AffineMap:
    return AffineMap(torch.randn(d_source), torch.randn(d_target, d_source), torch.randn(d_target))


def mlp() -> MLPMap:
    return MLPMap(
        torch.randn(4), torch.randn(5, 4), torch.randn(5), torch.randn(3, 5), torch.randn(3)
    )


def local() -> LocalMap:
    return LocalMap(torch.randn(4), torch.randn(3, 4, 3, 3), torch.randn(3), (2, 3))


def noise() -> NoiseConditionedMap:
    return NoiseConditionedMap(torch.randn(4), torch.randn(3, 3, 4), torch.randn(3, 3), 0.5, 2.0)


def steps() -> StepMaps:
    return StepMaps(torch.randn(4), [affine(), affine(), mlp()], [0, 2, 5], [8.0, 2.0, 0.5])


EACH = {"affine": affine, "mlp": mlp, "local": local, "noise": noise, "steps": steps}


@pytest.mark.parametrize("form", EACH)
def test_a_map_is_equal_after_saving(form: str, tmp_path: Path) -> None:
    card = MapCard("unet-a", "unet-b", "up.1", "up.2", form, {"list": [1, 2.5]}, {"fvu": 0.25})
    made = EACH[form]().with_card(**vars(card))
    made.save(tmp_path / "map.safetensors")
    for found in (
        load(tmp_path / "map.safetensors"),
        type(made).load(tmp_path / "map.safetensors"),
    ):
        assert found == made and type(found) is type(made) and found.card == card
    assert EACH[form]() != made
    assert repr(made).endswith("up.1 -> up.2 (" + form + "), 4 -> 3, FVU 0.250")
    x = torch.randn(2, 6, 4)
    found = ActivationMap.load(tmp_path / "map.safetensors")
    one, other = (each.apply(x, step=2, level=2.0) for each in (made, found))
    assert torch.equal(one, other) and one.shape == (2, 6, 3)


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    affine().save(tmp_path / "map.safetensors")
    with pytest.raises(InvalidInput, match="it holds a map of the form 'affine', not 'mlp'"):
        MLPMap.load(tmp_path / "map.safetensors")


@pytest.mark.parametrize("form", EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_keep_their_type(form: str, dtype: torch.dtype) -> None:
    made, x = EACH[form](), torch.randn(2, 6, 4)
    found = made.apply(x.to(dtype), step=0, level=1.0)
    expected = made.apply(x, step=0, level=1.0)
    assert found.dtype == dtype
    tolerance = {"atol": 0.2, "rtol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found.float(), expected, **tolerance)


def test_affine_and_mlp_are_their_formulas() -> None:
    x, one, other = torch.randn(7, 4), affine(), mlp()
    torch.testing.assert_close(one.apply(x), x @ one.weight.T + one.bias)
    hidden = (x @ other.weight_in.T + other.bias_in).clamp(min=0)
    torch.testing.assert_close(other.apply(x), hidden @ other.weight_out.T + other.bias_out)
    assert other.hidden == 5


def test_a_local_map_sums_neighbours_and_zeros_beyond_the_border() -> None:
    made, x = local(), torch.randn(2, 6, 4)
    grid = x.view(2, 2, 3, 4)
    expected = made.bias.expand(2, 2, 3, 3).clone()
    for row in range(2):
        for column in range(3):
            for i in range(3):
                for j in range(3):
                    a, b = row + i - 1, column + j - 1
                    if 0 <= a < 2 and 0 <= b < 3:
                        expected[:, row, column] += grid[:, a, b] @ made.weight[:, :, i, j].T
    torch.testing.assert_close(made.apply(x), expected.flatten(1, 2))
    inside = LocalMap(made.source_mean, made.weight, made.bias, (5, 5))
    v = torch.randn(4)
    r = made.source_mean.expand(25, 4)
    change = (inside.apply(r + 2 * v) - inside.apply(r)).view(5, 5, 3)[2, 2]
    torch.testing.assert_close(made.direction(v, alpha=2.0), change, atol=1e-4, rtol=1e-4)


def test_a_noise_conditioned_map_is_its_formula() -> None:
    made, x = noise(), torch.randn(3, 6, 4)
    levels = torch.tensor([0.3, 5.0, float("inf")], dtype=torch.float64)
    found = made.apply(x, level=levels)
    for row, s in enumerate([(0.3 + 0j), 5.0, None]):
        value = 1.0 if s is None else (torch.tensor(float(abs(s))).log().item() - 0.5) / 2
        value = max(-1.0, min(1.0, value))
        expected = sum(value**p * linear(x[row], made.weight[p], made.bias[p]) for p in range(3))
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)
        alone = made.apply(x[row], level=float(levels[row]))
        torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", EACH)
def test_a_direction_is_the_change_of_what_the_map_gives(form: str) -> None:
    if form == "local":
        pytest.skip("it has borders, see above")
    made, v = EACH[form](), torch.randn(2, 4)
    own = {"steps": {"step": 5}, "noise": {"level": 1.5}}.get(form, {})
    r = made.maps[2].source_mean if isinstance(made, StepMaps) else made.source_mean
    for at in (None, torch.randn(4)):
        place = (r if at is None else at).double()
        expected = made.apply(place + 3 * v.double(), **own) - made.apply(place, **own)
        found = made.direction(v, at, 3.0, **own)
        torch.testing.assert_close(found, expected.float())
    if form == "mlp":
        assert not torch.allclose(made.direction(v, alpha=2.0), 2 * made.direction(v))


def test_an_affine_direction_is_linear_in_alpha_and_the_same_everywhere() -> None:
    made, v = affine(), torch.randn(4)
    torch.testing.assert_close(made.direction(v, alpha=4.0), 4 * made.direction(v))
    assert torch.equal(made.direction(v, at=torch.randn(4)), made.direction(v))


def test_there_and_back() -> None:
    card = MapCard("a", "b", "x", "y", "ridge")
    made = affine(5, 5).with_card(**vars(card))
    back, x = made.inverse(), torch.randn(9, 5)
    torch.testing.assert_close(back.apply(made.apply(x)), x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(back.source_mean, made.apply(made.source_mean))
    assert back.card == MapCard("b", "a", "y", "x", "inverse of ridge")
    several = StepMaps(torch.zeros(5), [made, affine(5, 5)], [1, 2])
    several = several.with_card(**vars(card) | {"method": "steps", "scores": {"fvu": 0.5}})
    assert several.inverse().card == MapCard("b", "a", "y", "x", "inverse of steps")
    again = several.inverse().apply(several.apply(x, step=2), step=2)
    torch.testing.assert_close(again, x, atol=1e-3, rtol=1e-3)


def test_what_has_no_inverse() -> None:
    with pytest.raises(InvalidInput, match="from 4 to 3 features with rank 3; fit a map from the"):
        affine().inverse()
    flat = affine(4, 4)
    flat.weight[1] = flat.weight[0] + flat.weight[2]
    with pytest.raises(InvalidInput, match="from 4 to 4 features with rank 3"):
        flat.inverse()
    with pytest.raises(InvalidInput, match="a map of the form 'mlp' has no inverse"):
        mlp().inverse()


def test_the_map_of_a_step_is_found_by_number_or_noise() -> None:
    made = steps()
    assert made.at(2) is made.maps[1] and made.at(level=2.6) is made.maps[1]
    assert made.at(level=16.0) is made.maps[0]
    x = torch.randn(3, 2, 4)
    mixed = made.apply(x, step=torch.tensor([5, 0, 5]))
    for row, step in enumerate([5, 0, 5]):
        torch.testing.assert_close(mixed[row], made.apply(x[row], step=step))
    by_level = made.apply(x, level=torch.tensor([0.5, 8.0, 0.5]))
    torch.testing.assert_close(by_level, mixed)
    with pytest.raises(InvalidInput, match="no map for step 1, but for 0, 2, 5"):
        made.apply(x, step=1)
    with pytest.raises(InvalidInput, match="no map near noise level 100, but for 8, 2, 0.5"):
        made.at(level=100.0)
    with pytest.raises(InvalidInput, match="give step= or level="):
        made.apply(x)
    with pytest.raises(InvalidInput, match=r"one for all or \[3\], got \[2\]"):
        made.apply(x, step=torch.tensor([0, 2]))
    x = torch.randn(3, 4)  # of a step of another schedule, the noise is what tells its map
    assert torch.equal(made.apply(x, step=5, level=2.1), made.maps[1].apply(x))
    levels = torch.tensor([8.0, 0.5, 2.0])
    own = torch.stack([made.maps[n].apply(each) for n, each in zip((0, 2, 1), x, strict=True)])
    torch.testing.assert_close(made.apply(x, step=0, level=levels), own)
    unknown = StepMaps(made.source_mean, made.maps, made.steps)
    with pytest.raises(InvalidInput, match="the noise levels of its steps are not known"):
        unknown.apply(x, level=1.0)


def test_places_and_lengths_of_directions() -> None:
    v = torch.ones(2, 4)
    own = {"step": 0, "level": 1.0}
    for make in EACH.values():
        with pytest.raises(InvalidInput, match=r"at= must be \[\.\.\., 4\], got \[5\]"):
            make().direction(v, at=torch.zeros(5), **own)
        with pytest.raises(
            InvalidInput, match=r"directions \[2, 4\] cannot start at places \[3, 4\]"
        ):
            make().direction(v, at=torch.zeros(3, 4), **own)
        with pytest.raises(InvalidInput, match="alpha is a number, got None"):
            make().direction(v, alpha=None, **own)  # pyright: ignore[reportArgumentType]


def test_steps_are_whole_and_levels_not_negative() -> None:
    made, x, bad = steps(), torch.zeros(2, 4), "step is a whole number, got "
    for step, shown in ((1.7, "1.7"), (True, "True"), (torch.tensor(2.0), "tensor")):
        with pytest.raises(InvalidInput, match=bad + shown):
            made.apply(x, step=step)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=bad + "1.7"):
        made.apply(x, step=torch.tensor([1.7, 2.0]))
    assert torch.equal(made.apply(x, step=np.int64(2)), made.apply(x, step=torch.tensor(2)))
    for level in (-1.0, float("nan"), "high"):
        with pytest.raises(InvalidInput, match="level is a ratio of noise to signal from 0, got"):
            made.apply(x, level=level)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="noise levels must be numbers, got str"):
        noise().apply(x, level="high")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="StepMaps: a step is a whole number, got 0.5"):
        StepMaps(torch.zeros(4), [affine()], [0.5])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"grid is \(height, width\), got 6"):
        one = local()
        LocalMap(one.source_mean, one.weight, one.bias, 6)  # pyright: ignore[reportArgumentType]


def test_bad_input() -> None:
    with pytest.raises(InvalidInput, match="x must be a floating point tensor, got ndarray"):
        affine().apply(np.zeros((2, 4)))  # pyright: ignore[reportArgumentType]
    named = affine().with_card(source_site="mid", target_site="up")
    with pytest.raises(InvalidInput, match=r"map mid -> up .*must be \[\.\.\., 4\], got \[2, 5\]$"):
        named.apply(torch.zeros(2, 5))
    with pytest.raises(InvalidInput, match="the width of its target: is it used backwards"):
        named.apply(torch.zeros(2, 3))
    with pytest.raises(
        InvalidInput, match="a direction must be a floating point tensor, got torch.int64"
    ):
        named.direction(torch.zeros(4).long())
    with pytest.raises(InvalidInput, match=r"the tokens of a grid of 2 x 3, got \[5, 4\]"):
        local().apply(torch.zeros(5, 4))
    with pytest.raises(InvalidInput, match="give level="):
        noise().apply(torch.zeros(2, 4))
    with pytest.raises(InvalidInput, match="ratios of noise to signal from 0, got -1.0"):
        noise().apply(torch.zeros(2, 4), level=-1.0)
    with pytest.raises(InvalidInput, match=r"levels are one for all or \[2\], got \[3\]"):
        noise().apply(torch.zeros(2, 4), level=torch.ones(3))
    with pytest.raises(InvalidInput, match=r"AffineMap: weight must be .*\[3, 4\], got .*\[3, 5\]"):
        AffineMap(torch.zeros(4), torch.zeros(3, 5), torch.zeros(3))
    with pytest.raises(InvalidInput, match="AffineMap: bias has values that are not finite"):
        AffineMap(torch.zeros(4), torch.zeros(3, 4), torch.full((3,), torch.nan))
    with pytest.raises(InvalidInput, match="MLPMap: weight_out must be"):
        MLPMap(torch.zeros(4), torch.zeros(5, 4), torch.zeros(5), torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(InvalidInput, match="k is odd, .* got 2"):
        LocalMap(torch.zeros(4), torch.zeros(3, 4, 2, 2), torch.zeros(3), (2, 3))
    with pytest.raises(InvalidInput, match="maps of equal widths are needed"):
        StepMaps(torch.zeros(4), [affine(), affine(4, 5)], [0, 1])
    with pytest.raises(InvalidInput, match="a map for each step is needed, got 1 maps"):
        StepMaps(torch.zeros(4), [affine()], [0, 1])
