"""The launcher of the intervention program."""

import ctypes
from collections.abc import Callable

from torch import Tensor

from dreamreader.ops.intervention_program import decode
from tests.twin import DTYPES, compiled


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
        ("seen", ctypes.c_void_p),
    ]


def build() -> Callable[..., int]:
    """The launcher of the intervention program; it gives the number of launches."""
    launch = compiled("intervention")

    def intervention(
        x: Tensor, out: Tensor, code: str, strength, vectors, limits, masks, patches, seen=None
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
            seen=None if seen is None else seen.data_ptr(),
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
        return launch(call)

    return intervention
