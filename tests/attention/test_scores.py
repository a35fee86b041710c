"""Overlap and pointing, against masks worked out by hand."""

import pytest
import torch

from dreamreader.attention import iou, pointing
from dreamreader.errors import InvalidInput


def example() -> tuple[torch.Tensor, torch.Tensor]:
    maps = torch.tensor([[[[0.0, 0.1, 0.2], [0.3, 0.5, 0.4]], [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]])
    mask = torch.tensor([[[False, False, False], [True, True, False]]])
    return maps, mask


def test_overlap_by_a_share_of_the_maximum() -> None:
    maps, mask = example()
    # from 0.25 on: 0.3, 0.5, 0.4; two of them in the mask
    assert torch.allclose(iou(maps, mask, 0.5), torch.tensor([[2 / 3, 0.0]]))
    # from 0.45 on: 0.5 alone
    assert torch.allclose(iou(maps, mask, 0.9), torch.tensor([[1 / 2, 0.0]]))


def test_overlap_of_equal_areas() -> None:
    maps, mask = example()
    # the two highest are 0.5 and 0.4: one in the mask, three in all
    assert torch.allclose(iou(maps, mask, "area"), torch.tensor([[1 / 3, 0.0]]))
    whole = torch.ones(1, 2, 3, dtype=torch.bool)
    assert torch.equal(iou(maps, whole, "area"), torch.ones(1, 2))
    # ties are broken by place, so that the area is right for a flat map
    flat = torch.ones(1, 1, 2, 3)
    assert torch.allclose(iou(flat, mask, "area"), torch.tensor([[0.0]]))


def test_pointing_takes_the_highest_pixel() -> None:
    maps, mask = example()
    assert torch.equal(pointing(maps, mask), torch.tensor([[1.0, 0.0]]))


def test_unknown_values_stay_unknown() -> None:
    maps, mask = example()
    maps[0, 1] = torch.nan
    for score in (iou(maps, mask), iou(maps, mask, "area"), pointing(maps, mask)):
        assert score[0].isnan().tolist() == [False, True]
    empty = torch.zeros_like(mask)
    assert iou(maps, empty).isnan().all() and pointing(maps, empty).isnan().all()


def test_further_axes_stay() -> None:
    maps, mask = example()
    deep = torch.stack([maps, maps.flip(1)], 2)  # [rows, words, steps, h, w]
    assert torch.equal(iou(deep, mask, "area")[:, :, 0], iou(maps, mask, "area"))
    assert torch.equal(pointing(deep, mask)[:, :, 1], pointing(maps, mask).flip(1))


def test_bad_masks_say_why() -> None:
    maps, mask = example()
    with pytest.raises(InvalidInput, match=r"masks must be bool \[rows, h, w\], got float32"):
        iou(maps, mask.float())
    with pytest.raises(InvalidInput, match=r"masks are \[1, 2, 2\], the maps \[1, 2, 2, 3\]"):
        pointing(maps, mask[..., :2])
    with pytest.raises(InvalidInput, match=r"threshold must be 'area' or in \(0, 1\], got 1.5"):
        iou(maps, mask, 1.5)
    with pytest.raises(InvalidInput, match="threshold must be 'area'"):
        iou(maps, mask, "otsu")
