"""The kernels' threads: several callers at once, and processes that were forked after a call."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dreamreader.ops import Instruction, Program, intervene

FORKED = """
import os, sys, torch
from dreamreader.ops import Instruction, Program, intervene
torch.set_num_threads(2)
x = torch.ones(1, 2000, 320)
double = Program([Instruction("scale", lo=2.0)], rows=1, tokens=2000, width=320)
if "called" in sys.argv:
    assert intervene(x, double).eq(2).all()
else:
    assert x.add(1).eq(2).all()  # torch alone has used its threads
child = os.fork()
if child == 0:
    os._exit(0 if (intervene(x, double).numpy() == 2).all() else 1)  # torch itself would wait
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("parent", ["called", "torch alone"])
def test_a_forked_process_does_not_wait_for_its_parents_threads(parent: str):
    command = [sys.executable, "-c", FORKED, parent]
    done = subprocess.run(command, timeout=600, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_callers_at_once_get_what_each_alone_gets():
    scale = Program([Instruction("scale", lo=3.0)], rows=2, tokens=1500, width=320)
    inputs = [torch.randn(2, 1500, 320) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda x: intervene(x, scale), inputs))
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, x * 3)
