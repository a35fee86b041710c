"""A threshold of inference from rows."""

import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.sae import (
    BatchTopK,
    JumpReLU,
    SampledTopK,
    SparseAutoencoder,
    TopK,
    calibrate_threshold,
)

ROWS = [torch.randn(400, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("normalise", ["none", "average_norm"])
def test_as_many_are_active_as_the_budget_says(rescale: bool, normalise: str) -> None:
    sae = SparseAutoencoder(
        8, 48, SampledTopK(4, l=1), rescale=rescale, normalise=normalise, decoder_norm=0.3
    ).eval()
    with torch.no_grad():
        sae.W_dec[:24] *= 3
    if normalise != "none":
        sae.fit_normalisation(ROWS[0] * 7)
    sae.threshold = 0.0
    x = torch.cat(ROWS)
    assert sae.encode_sparse(x).count() > 10 * len(x)  # what a small pool teaches
    calibrate_threshold(sae, ROWS)
    assert abs(float(sae.encode_sparse(x).count()) / len(x) - 4) < 0.05
    assert sae.encodes_rows_alone


def test_the_threshold_is_the_smallest_of_the_largest() -> None:
    sae = SparseAutoencoder(8, 48, BatchTopK(2)).eval()
    with torch.no_grad():
        a = (ROWS[0] - sae.b_dec) @ sae.W_enc + sae.b_enc
    calibrate_threshold(sae, ROWS[:1])
    wanted = a.flatten().sort(descending=True).values[2 * len(a) - 1]
    assert sae.threshold is not None
    torch.testing.assert_close(sae.threshold[0], wanted)


def test_what_has_no_budget_or_no_rows_is_refused() -> None:
    for selection in (TopK(2), JumpReLU()):
        with pytest.raises(InvalidInput, match="thresholds are of BatchTopK and SampledTopK"):
            calibrate_threshold(SparseAutoencoder(8, 16, selection), ROWS)
    for rows in ([], [torch.zeros(4, 8)]):
        with pytest.raises(InvalidInput, match="nothing is active in these batches"):
            calibrate_threshold(SparseAutoencoder(8, 16, BatchTopK(2)), rows)


def test_a_batch_counts_by_its_rows() -> None:
    sae = SparseAutoencoder(8, 48, BatchTopK(2)).eval()
    thresholds = []
    for batches in (ROWS[:1], ROWS[1:2], [ROWS[0], ROWS[1][:7]]):
        calibrate_threshold(sae, batches)
        assert sae.threshold is not None
        thresholds.append(float(sae.threshold[0]))
    calibrate_threshold(sae, [ROWS[1][:7]])
    last = float(sae.threshold[0])
    assert thresholds[2] == pytest.approx((400 * thresholds[0] + 7 * last) / 407, rel=1e-5)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (torch.full((3, 8), float("nan")), "batch 1 has values that are not finite"),
        (torch.zeros(3, 7), r"batch 1 must be \[rows, 8\], got \[3, 7\]"),
        (torch.zeros(8), r"batch 1 must be \[rows, 8\], got \[8\]"),
    ],
)
def test_a_batch_that_says_nothing_is_refused(batch: torch.Tensor, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        calibrate_threshold(SparseAutoencoder(8, 16, BatchTopK(2)), [ROWS[0], batch])
