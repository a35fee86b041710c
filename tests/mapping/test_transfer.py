"""Directions, MLPs and learned edits of a source in a target: what they do is carried too."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dreamreader.edits import LoReFT, Mlp
from dreamreader.errors import InvalidInput
from dreamreader.mapping import (
    AffineMap,
    MLPMap,
    NoiseConditionedMap,
    StepMaps,
    map_direction,
    map_loreft,
    map_mlp,
)


def there_and_back(d_source: int = 4, d_target: int = 6) -> tuple[AffineMap, AffineMap]:
    """The second undoes the first on what it gives."""
    weight, bias = torch.randn(d_target, d_source), torch.randn(d_target)
    back = torch.linalg.pinv(weight)
    forward = AffineMap(torch.randn(d_source), weight, bias).with_card(target_site="up.2")
    return forward, AffineMap(torch.randn(d_target), back, -back @ bias)


def perceptron() -> MLPMap:
    shapes = ((4,), (5, 4), (5,), (6, 5), (6,))
    return MLPMap(*(torch.randn(shape) for shape in shapes))


def test_directions_of_steps_are_mapped_by_their_own() -> None:
    forward, other, v = there_and_back()[0], perceptron(), torch.randn(4, 4)
    v[1] = 0
    torch.testing.assert_close(map_direction(forward, v), v @ forward.weight.T)
    torch.testing.assert_close(map_direction(other, v[0], 3.0), other.direction(v[0], alpha=3.0))
    maps = StepMaps(torch.zeros(4), [forward, other], [0, 2])
    v[3] = 0
    found = map_direction(maps, v, 2.0)
    torch.testing.assert_close(found[0], 2 * v[0] @ forward.weight.T)
    torch.testing.assert_close(found[2], other.direction(v[2], alpha=2.0))
    assert not found[1].any() and not found[3].any()
    with pytest.raises(InvalidInput, match="no map for step 1, but for 0, 2"):
        map_direction(maps, torch.ones(4, 4))
    with pytest.raises(InvalidInput, match=r"a direction is \[steps, 4\], got \[4\]"):
        map_direction(maps, torch.ones(4))


def test_directions_of_a_map_that_depends_on_the_noise() -> None:
    made = NoiseConditionedMap(torch.zeros(4), torch.randn(2, 6, 4), torch.randn(2, 6), 0.0, 1.0)
    v, levels = torch.randn(3, 4), torch.tensor([0.5, 1.0, 2.0])
    found = map_direction(made, v, level=levels)
    for row, level in enumerate(levels.tolist()):
        expected = made.direction(v[row], level=level)
        torch.testing.assert_close(found[row], expected)
        torch.testing.assert_close(map_direction(made, v[row], level=level), expected)
    assert not torch.allclose(found[0] / v[0].norm(), map_direction(made, v[0], level=2.0))
    with pytest.raises(InvalidInput, match="it depends on the noise; give level="):
        map_direction(made, v)
    several = StepMaps(torch.zeros(4), [there_and_back()[0], made], [0, 1], [4.0, 1.0])
    near = map_direction(several, v[0], level=3.5)
    torch.testing.assert_close(near, several.maps[0].direction(v[0]))


@pytest.mark.parametrize("noise", [None, torch.ones(5, 3)])
def test_a_mapped_mlp_says_of_mapped_rows_what_it_said(noise: Tensor | None) -> None:
    forward, backward = there_and_back()
    weights, biases = [torch.randn(5, 4), torch.randn(2, 5)], [torch.randn(5), torch.randn(2)]
    mlp = Mlp(weights, biases, "gelu", ("red", "blue"), noise=noise)
    found, x = map_mlp(mlp, backward), torch.randn(7, 4)
    fraction = None if noise is None else 0.5
    logits = found.logits(forward.apply(x), fraction)
    torch.testing.assert_close(logits, mlp.logits(x, fraction), atol=1e-4, rtol=1e-4)
    assert (found.width, found.labels) == (6, ("red", "blue"))


@pytest.mark.parametrize("stacked", [(), (3,)])
@pytest.mark.parametrize("named", [False, True])
def test_a_mapped_edit_changes_mapped_rows_as_it_did(stacked: tuple[int, ...], named: bool) -> None:
    forward, backward = there_and_back()
    shapes = ((2, 4), (2,), (2, 4))
    down, bias, up = (torch.randn(*stacked, *shape) for shape in shapes)
    tables = [{"mid": each} for each in (down, bias, up)] if named else [down, bias, up]
    edit = LoReFT("mid", *tables, alpha=0.5, steps=[1, 2])
    found = map_loreft(edit, forward, backward)
    assert found.sites == ("up.2",) and found.alpha == 0.5 and found.steps == edit.steps
    own = [each for each in (found.down, found.bias, found.up) if isinstance(each, Tensor)]
    x = torch.randn(9, 4)
    y = forward.apply(x)
    change = torch.einsum("...rd,nd->...nr", down, x) + bias.unsqueeze(-2)
    expected = change @ up @ forward.weight.T
    mapped = torch.einsum("...rd,nd->...nr", own[0], y) + own[1].unsqueeze(-2)
    torch.testing.assert_close(mapped @ own[2], expected, atol=1e-3, rtol=1e-3)


def test_what_cannot_be_carried() -> None:
    forward, backward = there_and_back()
    with pytest.raises(InvalidInput, match="a map from source to target is needed, got Tensor"):
        map_direction(forward.weight, torch.ones(4))  # pyright: ignore[reportArgumentType]
    mlp = Mlp([torch.zeros(2, 4)], [torch.zeros(2)])
    edit = LoReFT("mid", torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, 4))
    with pytest.raises(InvalidInput, match="the MLP reads 4 features, .* gives 6"):
        map_mlp(mlp, forward)
    with pytest.raises(InvalidInput, match="backward must be an affine map, got MLPMap"):
        map_mlp(mlp, perceptron())  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"needs forward \[n, 4\] and backward \[4, n\], got"):
        map_loreft(edit, backward, forward, "up.2")
    with pytest.raises(InvalidInput, match="the site of the target is not known"):
        map_loreft(edit, forward.with_card(target_site=None), backward)
    with pytest.raises(InvalidInput, match="an edit of one site is mapped, got 2"):
        map_loreft(replace(edit, site=["mid", "low"]), forward, backward)
    flat = LoReFT("m", torch.zeros(1, 4), torch.zeros(1), torch.zeros(1, 4), variant="diagonal")
    with pytest.raises(InvalidInput, match="a diagonal edit"):
        map_loreft(flat, forward, backward)
