"""The CUDA kernels on the CPU: their own source, compiled against stand-ins for CUDA headers.

One module for each operator: the arguments of its launcher, as `Call` in the C++ file beside it.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreamreader" / "twins"
# Native instructions: like a GPU, they multiply and add with one rounding. Fortified, a jump of a
# thread to the stack of another is an error.
FLAGS = (
    "-std=c++20 -O1 -march=native -shared -fPIC -DDREAMREADER_CUDA=1 -U_FORTIFY_SOURCE "
    "-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-class-memaccess -Wno-clobbered"
)
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


@cache
def library(name: str) -> ctypes.CDLL:
    """The twin of an operator; compiled once for what its sources are to the compiler."""
    compiler = shutil.which("g++")
    assert compiler
    command = [compiler, *FLAGS.split(), f"-I{HERE}", str(HERE / f"{name}.cpp")]
    text = subprocess.run([*command, "-E", "-P"], check=True, capture_output=True).stdout
    built = CACHE / f"{name}-{hashlib.sha256(FLAGS.encode() + text).hexdigest()[:24]}.so"
    if not built.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{name}-*.so"):
            old.unlink(missing_ok=True)
        fresh = built.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(fresh)], check=True)
        fresh.replace(built)  # another process may have been as fast
    return ctypes.CDLL(str(built))


def compiled(name: str) -> Callable[[ctypes.Structure], int]:
    """The launcher of an operator's twin; it takes a call and returns the launches."""
    entry = library(name)[name]

    def launch(call: ctypes.Structure) -> int:
        launches, message = ctypes.c_int64(), ctypes.create_string_buffer(200)
        error = entry(ctypes.byref(call), ctypes.byref(launches), message, ctypes.c_size_t(200))
        assert error == 0, f"CUDA error {error}: {message.value.decode()}"
        return launches.value

    return launch


def limit_shared(name: str, size: int) -> None:
    """Lets the twin of an operator be a device whose blocks have `size` bytes of shared memory."""
    library(name).limit_shared(ctypes.c_int64(size))
