"""The native module where the system gives no memory or no thread: an error, never the end
of the process.

Each case runs in a process of its own, whose limits are lowered once everything is loaded.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreamreader._register import native

pytestmark = pytest.mark.skipif(native()[0] is None, reason="the native module is not built")
ROOT = Path(__file__).parents[2]
# What is freed goes back to the system, and threads hold no memory in reserve.
SMALL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}

# `starve` leaves the process as much address space as it has now, and `extra` bytes.
PRELUDE = """
import os, resource, torch
from dreamreader._register import native
from dreamreader.ops import Instruction, Program, intervene_, low_rank_, moments
C = native()[0]
torch.set_num_threads(2)

def starve(extra):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))

def said(call):
    try:
        call()
    except (MemoryError, OSError) as error:
        print(type(error).__name__, error, sep=": ")
    else:
        print("ran")
"""
NO_MEMORY = "MemoryError: dreamreader: the system has no memory left for this call"


def run(code: str) -> list[str]:
    """What a process with this code prints, line by line; it may not end by a signal."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        cwd=ROOT,
        env=os.environ | SMALL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout.splitlines()


# Megabytes of scratch for each thread, or of sums for each piece of rows; none is there yet.
CALLS = """
x = torch.ones(2, 65536, 64).transpose(1, 2)
program = Program([Instruction("renorm")], rows=2, tokens=64, width=65536)
columns = lambda: intervene_(x, program)

rows, table, bias = torch.ones(2, 64, 65536), torch.zeros(1, 64, 65536), torch.zeros(1, 64)
low_rank = lambda: low_rank_(rows, table, bias, table)

y, to, weight = torch.ones(1, 64, 64), torch.ones(1, 64, 64), torch.zeros(65536, 64)
first, gram, c = torch.zeros(1, 1, 65536), torch.zeros(0, 0), torch.ones(1, 65536)
own = torch.ones(1, 64), 1.0, 1, float("inf"), 2
guide = lambda: C.guide_cpu(y, to, [weight], [first], gram, 0, c, *own)

q, k = torch.ones(1, 4, 256, 64), torch.ones(1, 4, 65536, 64)
weights, out = torch.ones(1, 2, 65536), torch.zeros(1, 4, 2, 256)
words = lambda: C.attention_words_cpu(out, q, k, weights, None, False, 1.0, 2)

z, labels, shift = torch.ones(65536, 64), torch.zeros(65536).long(), torch.zeros(64).double()
seen, total, square = torch.zeros(4096).long(), *torch.zeros(2, 4096, 64).double()
sums = lambda: C.moments_cpu(z, labels, shift, seen, total, square, 2)
"""


def test_a_kernel_without_memory_raises_and_runs_when_there_is_some():
    code = """
for call in (columns, low_rank, guide, words, sums):
    starve(0)
    said(call)
    said(call)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    said(call)
"""
    assert run(CALLS + code) == [NO_MEMORY, NO_MEMORY, "ran"] * 5


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_an_operator_runs_where_the_user_may_start_no_thread():
    code = """
x = torch.randn(2, 64, 65536)
want = 2 * x
program = Program([Instruction("scale", lo=2.0)], rows=2, tokens=64, width=65536)
os.setgid(65534)
os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
said(lambda: intervene_(x, program))
print(torch.equal(x, want))
said(lambda: C.ShardWriter(1 << 20, 1 << 16, 3, 1, False))
"""
    refused = (
        "BlockingIOError: [Errno 11] writer: 3 threads are wanted, after 0 none can be started: "
        "Resource temporarily unavailable"
    )
    assert run(code) == ["ran", "True", refused]


def test_a_writer_whose_threads_cannot_be_started_raises_and_ends_those_that_were():
    code = """
before = len(os.listdir("/proc/self/task"))
starve(200 << 20)
said(lambda: C.ShardWriter(1 << 20, 1 << 16, 64, 1, False))
print(len(os.listdir("/proc/self/task")) - before)
said(lambda: C.ShardWriter(1 << 20, 1 << 16, 1, 1, False))
said(lambda: C.ShardWriter(1 << 30, 1 << 16, 1, 1, False))
"""
    refused, left, smaller, larger = run(code)
    assert refused.startswith("BlockingIOError: [Errno 11] writer: 64 threads are wanted, after")
    assert (left, smaller, larger) == ("0", "ran", NO_MEMORY)
