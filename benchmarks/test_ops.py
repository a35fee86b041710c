"""Quick times of the intervention program on this machine, to compare with one's own earlier ones.

    pytest benchmarks --benchmark-autosave      # then: pytest benchmarks --benchmark-compare

`run.py` is the one whose figures are published: it measures against baselines in the same rounds.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from run import KINDS, check  # noqa: E402

from dreamreader.ops import intervene_  # noqa: E402
from tests.cases import intervention as cases  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_intervene(benchmark, kind: str, dtype: torch.dtype):
    make, layout = KINDS[kind]
    case = cases.Case(kind, (1, 1024, 320), make, layout)
    check(case, dtype)
    benchmark(intervene_, case.input(dtype), case.program())
