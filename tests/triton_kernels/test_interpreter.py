"""Every operator's Triton kernel in the interpreter, in one Python for each stem."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cases import MODULES, TESTED
from tests.cases._operator import Kernel, Operator
from tests.ops.harness import by_kernel, check_kernel
from tests.triton_kernels.harness import compiled, interpreted

STEMS = [name for name, module in MODULES.items() if any(each.triton for each in module.TESTED)]


@interpreted
@by_kernel("triton")
def test_kernel(op: Operator, kernel: Kernel, dtype: torch.dtype, poisoned: None):
    check_kernel(op, kernel, dtype)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_interpreted(stem: str):
    """What is marked for the interpreter: here for the operators of a stem, and in its own file."""
    here = Path(__file__)
    own = [each.name for each in MODULES[stem].TESTED]
    longer = [name for name in TESTED if name not in own and any(each in name for each in own)]
    names = f"({' or '.join(own)})" + "".join(f" and not {name}" for name in longer)
    files = [here, here.with_name(f"test_{stem}.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreter"]
    done = subprocess.run(
        [*command, "-k", f"not test_kernel or ({names})", *map(str, files)],
        cwd=here.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
