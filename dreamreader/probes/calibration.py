"""Calibration: whether what a probe calls 80 % sure is right in 80 % of the cases."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput

_COLDEST, _HOTTEST = 1e-2, 1e2


def temperature(
    logits: Float[Tensor, "rows classes"],
    targets: Int[Tensor, " rows"] | Float[Tensor, "rows classes"],
) -> float:
    """The T for which softmax(logits / T), or the sigmoid for flags, fits the targets best.

    argmin_T of the cross-entropy, which is convex in 1 / T; found where its derivative is 0. One
    more row of unknown class is counted with those given (in the manner of Platt), so that rows
    without any error do not ask for T = 0.

    Args:
        logits: of rows that had no part in the training.
        targets: numbers of the classes, or flags of labels, each told on its own.

    Returns:
        T, from 0.01 to 100.

    Raises:
        InvalidInput: there are no rows, or targets do not fit.

    Example:
        >>> overconfident = torch.tensor([[9.0, 0.0]] * 4)
        >>> round(temperature(overconfident, torch.tensor([0, 0, 0, 1])), 1)
        10.6

    Reference:
        Guo et al., On calibration of modern neural networks (2017); Platt (1999).
    """
    _check("temperature", logits, targets)
    z = logits.double()
    n, k = z.shape
    flags = targets.dim() == 2
    seen = targets.double() if flags else torch.nn.functional.one_hot(targets, k).double()
    wanted = (seen * n + 1 / (2 if flags else k)) / (n + 1)  # [rows, classes]
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    for _ in range(80):
        beta = (low * high) ** 0.5
        predicted = (beta * z).sigmoid() if flags else (beta * z).softmax(-1)
        if float(((predicted - wanted) * z).sum()) > 0:
            high = beta
        else:
            low = beta
    return 1 / (low * high) ** 0.5


def expected_calibration_error(
    probabilities: Float[Tensor, "rows classes"],
    targets: Int[Tensor, " rows"] | Float[Tensor, "rows classes"],
    bins: int = 15,
) -> float:
    """Mean distance between how sure a probe is and how often it is right.

    ECE = sum over bins of (n_b / n) |accuracy_b - confidence_b|, bins of equal width.

    Args:
        probabilities: of the classes, whose largest is the confidence; with flags of each label,
            whose larger side is.
        bins: number of bins between 0 and 1.

    Returns:
        From 0 to 1.

    Raises:
        InvalidInput: there are no rows or bins, or targets do not fit.

    Example:
        >>> expected_calibration_error(torch.tensor([[0.75, 0.25]] * 4), torch.tensor([0, 0, 0, 1]))
        0.0

    Reference:
        Naeini, Cooper and Hauskrecht, Obtaining well calibrated probabilities (2015).
    """
    _check("expected_calibration_error", probabilities, targets)
    if bins < 1:
        raise InvalidInput(f"bins must be at least 1, got {bins}")
    p = probabilities.double()
    if targets.dim() == 2:
        sure, right = torch.maximum(p, 1 - p).flatten(), ((p >= 0.5) == (targets > 0)).flatten()
    else:
        sure, right = p.max(-1).values, p.argmax(-1) == targets
    place = (sure * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=p.device)
    gap.index_add_(0, place, right.double() - sure)
    return float(gap.abs().sum()) / len(sure)


def brier(
    probabilities: Float[Tensor, "rows classes"],
    targets: Int[Tensor, " rows"] | Float[Tensor, "rows classes"],
) -> float:
    """Mean squared distance of the probabilities from what was the case.

    (1/n) sum_i sum_k (p_ik - y_ik)^2, y one-hot; of flags the mean over labels.

    Returns:
        0 where all are sure and right; to 2 (flags: 1).

    Raises:
        InvalidInput: there are no rows, or targets do not fit.

    Reference:
        Brier, Verification of forecasts expressed in terms of probability (1950).
    """
    _check("brier", probabilities, targets)
    p = probabilities.double()
    if targets.dim() == 2:
        return float((p - targets).square().mean())
    wanted = torch.nn.functional.one_hot(targets, p.shape[-1])
    return float((p - wanted).square().sum(-1).mean())


def _check(name: str, values: Tensor, targets: Tensor) -> None:
    if values.dim() != 2 or not len(values) or not values.is_floating_point():
        raise InvalidInput(f"{name}: values [rows, classes] are needed, got {list(values.shape)}")
    fits = (
        targets.shape == values.shape if targets.dim() == 2 else targets.shape == values.shape[:1]
    )
    if not fits:
        raise InvalidInput(
            f"{name}: targets {list(targets.shape)} do not fit {list(values.shape)} values"
        )
    if targets.dim() == 1 and not 0 <= int(targets.min()) <= int(targets.max()) < values.shape[1]:
        wrong = int(targets.max()) if int(targets.min()) >= 0 else int(targets.min())
        raise InvalidInput(f"{name}: class {wrong} of {values.shape[1]}")
