"""The CUDA kernels on the CPU: their own source, compiled against stand-ins for CUDA headers."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dreamreader.ops.program import decode

HERE = Path(__file__).parent
# Native instructions: like a GPU, they multiply and add with one rounding.
FLAGS = (
    "-std=c++20 -O1 -march=native -shared -fPIC -DDREAMREADER_CUDA=1 "
    "-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-class-memaccess -Wno-clobbered"
)
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


class Call(ctypes.Structure):
    """As `Call` in intervention.cpp."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("shape", ctypes.c_int64 * 3),
        ("x_strides", ctypes.c_int64 * 3),
        ("out_strides", ctypes.c_int64 * 3),
        ("count", ctypes.c_int64),
        ("steps", ctypes.c_void_p),
        ("strength", ctypes.c_void_p),
        ("strength_strides", ctypes.c_int64 * 3),
        ("vectors", ctypes.c_void_p),
        ("limits", ctypes.c_void_p),
        ("masks", ctypes.c_void_p),
        ("sources", ctypes.c_int64),
        ("source_fields", (ctypes.c_int64 * 8) * 8),
    ]


def build(folder: Path) -> Callable[..., int]:
    """Compiles the twin into `folder`; returns its launcher, which gives the number of launches."""
    library = folder / "libtwin.so"
    compiler = shutil.which("g++")
    assert compiler
    command = [
        compiler,
        *FLAGS.split(),
        f"-I{HERE}",
        str(HERE / "intervention.cpp"),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    entry = ctypes.CDLL(str(library)).intervention

    def intervention(
        x: Tensor, out: Tensor, code: str, strength, vectors, limits, masks, patches
    ) -> int:
        steps = (ctypes.c_int32 * (9 * 32))(*(field for step in decode(code) for field in step))
        call = Call(
            x=x.data_ptr(),
            out=out.data_ptr(),
            dtype=DTYPES[x.dtype],
            shape=tuple(x.shape),
            x_strides=x.stride(),
            out_strides=out.stride(),
            count=len(decode(code)),
            steps=ctypes.addressof(steps),
            strength=strength.data_ptr(),
            strength_strides=strength.stride(),
            vectors=vectors.data_ptr(),
            limits=limits.data_ptr(),
            masks=masks.data_ptr(),
            sources=len(patches) // 2,
        )
        for number, (source, index) in enumerate(zip(patches[::2], patches[1::2], strict=True)):
            call.source_fields[number][:] = (
                source.data_ptr(),
                DTYPES[source.dtype],
                len(source),
                *source.stride(),
                index.data_ptr(),
                *index.stride(),
            )
        launches, message = ctypes.c_int64(), ctypes.create_string_buffer(200)
        error = entry(ctypes.byref(call), ctypes.byref(launches), message, ctypes.c_size_t(200))
        assert error == 0, f"CUDA error {error}: {message.value.decode()}"
        return launches.value

    return intervention
