"""The launcher of the packing."""

import ctypes
from collections.abc import Callable

from torch import Tensor

from dreamreader.ops.pack import STORED
from tests.twin import DTYPES, compiled


class Call(ctypes.Structure):
    """As `Call` in pack.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "minus", "places", "groups")),
        *((name, ctypes.c_void_p) for name in ("out", "scales", "not_finite")),
        *((name, ctypes.c_int64) for name in ("source", "stored", "pool", "rows", "features")),
        ("x_strides", ctypes.c_int64 * 3),
        ("minus_strides", ctypes.c_int64 * 3),
    ]


def build() -> Callable[..., int]:
    """The launcher of the packing, with the operator's arguments; it gives the launches."""
    launch = compiled("pack")

    def pack(out: Tensor, scales, not_finite, x: Tensor, places, minus, groups, pool: int) -> int:
        named = {"minus": minus, "groups": groups, "scales": scales, "not_finite": not_finite}
        call = Call(
            x=x.data_ptr(),
            places=places.data_ptr(),
            out=out.data_ptr(),
            source=DTYPES[x.dtype],
            stored=STORED.index(out.dtype),
            pool=pool,
            rows=out.shape[0],
            features=out.shape[1],
            x_strides=x.stride(),
            **{name: each.data_ptr() for name, each in named.items() if each is not None},
        )
        if minus is not None:
            call.minus_strides[:] = minus.stride()
        return launch(call)

    return pack
