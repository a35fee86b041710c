"""Tolerance: err(kernel) <= 2 err(reference, same dtype) + one ulp of the largest value."""

import torch
from torch import Tensor

from dreamreader.ops.intervention import CHANGED, NOT_FINITE, OVERFLOWED

# In float64 nothing more exact is at hand; sums in another order differ by some ulps.
DOUBLE_ULPS = 64


def ulp(value: Tensor, dtype: torch.dtype) -> float:
    """Distance of the value, rounded to dtype, to the next number above."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.double()).exponent.item() - 1
    return max(2.0**exponent * info.eps, info.smallest_normal * info.eps)


def assert_close(got: Tensor, same: Tensor, exact: Tensor, ulps: int = 1) -> None:
    """Raises AssertionError unless `got` is as good as the rule asks.

    Args:
        got: result of a kernel.
        same: result of the reference in the same dtype.
        exact: result of the reference in float64.
        ulps: of the largest value, where a case has a reason for more than one.
    """
    assert got.shape == exact.shape
    rounded = exact.to(got.dtype)
    # Where the exact result overflows the dtype, or the sum in the row does, both have to say so.
    odd = ~rounded.isfinite() | ~same.isfinite()
    assert torch.equal(got.isnan() & odd, same.isnan() & odd)
    assert torch.equal(got.isfinite() & ~odd, ~odd)
    error, allowed = ((each.double() - exact).abs()[~odd] for each in (got, same))
    if error.numel():
        largest = exact[~odd].abs().max()
        ulps = DOUBLE_ULPS if got.dtype == torch.float64 else ulps
        bound = 2 * allowed.max().item() + ulps * ulp(largest, got.dtype)
        assert error.max().item() <= bound, f"error {error.max().item():.3g} above {bound:.3g}"


def assert_seen(x: Tensor, y: Tensor, touched: Tensor, bits: int) -> None:
    """That `bits` say of the touched rows what the results themselves say."""
    assert bool(bits & CHANGED) == bool((x != y)[touched].any())
    half = x.dtype in (torch.bfloat16, torch.float16)
    assert bool(bits & OVERFLOWED) == (half and not y[touched].isfinite().all())
    if half and x[touched].isfinite().all():
        assert not bits & NOT_FINITE


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    dense = (each.reshape(-1).clone(memory_format=torch.contiguous_format) for each in (a, b))
    return torch.equal(*(each.view(torch.uint8) for each in dense))
