"""The divergence of next tokens: against torch's in float64, whatever the slices."""

import pytest
import torch
from torch.nn.functional import kl_div

from dreamreader.errors import InvalidInput
from dreamreader.metrics import Outputs, build
from dreamreader.metrics.next_token_kl import mean_divergence

DRAW = torch.Generator().manual_seed(0)
NATIVE, EDITED = (torch.randn(3, 5, 11, generator=DRAW) * 4 for _ in range(2))
CHOSEN = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()


@pytest.mark.parametrize("slice_bytes", [1, 3 * 4 * 11, 2**26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_that_of_torch_in_any_slices(slice_bytes: int, dtype: torch.dtype) -> None:
    native, edited = NATIVE.to(dtype), EDITED.to(dtype)
    logs = [each.double().log_softmax(-1) for each in (native, edited)]
    each = kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)
    wanted = [each[row][CHOSEN[row]].mean().item() for row in range(3)]
    found = mean_divergence(native, edited, CHOSEN, slice_bytes)
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert mean_divergence(native, native, CHOSEN, slice_bytes).tolist() == [0, 0, 0]


def test_tokens_that_cannot_come_count_nothing() -> None:
    native, edited = NATIVE.clone(), EDITED.clone()
    native[..., 3] = edited[..., 3] = -torch.inf
    kept = [n for n in range(11) if n != 3]
    wanted = mean_divergence(NATIVE[..., kept], EDITED[..., kept], CHOSEN)
    torch.testing.assert_close(mean_divergence(native, edited, CHOSEN), wanted)


def test_a_row_without_a_position_is_refused() -> None:
    with pytest.raises(InvalidInput, match="next_token_kl: row 1 has no position"):
        mean_divergence(NATIVE, EDITED, CHOSEN & torch.tensor([[1], [0], [1]]).bool())


def test_it_reads_what_the_experiment_measured() -> None:
    found = build("next_token_kl").measure(Outputs([{}, {}], divergence=torch.ones(2)), None)
    assert found == {"next_token_kl": [1.0, 1.0]}
    with pytest.raises(InvalidInput, match="next_token_kl needs divergence; the outputs have none"):
        build("next_token_kl").measure(Outputs([{}]), None)
