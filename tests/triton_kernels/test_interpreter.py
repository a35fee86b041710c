"""Every operator's Triton kernel in the interpreter, in a Python of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cases._operator import Kernel, Operator
from tests.ops.harness import by_kernel, check_kernel
from tests.triton_kernels.harness import compiled, interpreted


@interpreted
@by_kernel("triton")
def test_kernel(op: Operator, kernel: Kernel, dtype: torch.dtype, poisoned: None):
    check_kernel(op, kernel, dtype)


@compiled
@pytest.mark.slow
def test_interpreted():
    """What is marked for the interpreter: here for every operator, and in the files beside."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreter"]
    done = subprocess.run(
        [*command, str(here)],
        cwd=here.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
