"""The launchers of the low-rank edit and of its gradient."""

import ctypes

import torch
from torch import Tensor

from tests.twin import DTYPES, compiled, library


class Call(ctypes.Structure):
    """As `Call` in low_rank.cpp."""

    _fields_ = [
        ("dtype", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 5),
        *((name, ctypes.c_void_p) for name in ("down", "bias", "up", "strength")),
        ("strength_strides", ctypes.c_int64 * 2),
        ("index", ctypes.c_void_p),
        ("index_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "out", "grad")),
        ("x_strides", ctypes.c_int64 * 3),
        ("out_strides", ctypes.c_int64 * 3),
        ("grad_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in ("d_down", "d_bias", "d_up", "d_strength")),
        ("workspace", ctypes.c_void_p),
    ]


class LowRankTwin:
    """The launchers of the low-rank edit and its gradient, as `dreamreader._C` has them."""

    def __init__(self) -> None:
        self.launch = compiled("low_rank")
        self._workspace = library("low_rank").workspace
        self._workspace.restype = ctypes.c_int64

    def low_rank(self, x: Tensor, out: Tensor, *tables: Tensor) -> int:
        """Writes out, which may be x; gives the launches."""
        return self.launch(self._call(x, out, tables))

    def backward(self, grad: Tensor, x: Tensor, *rest: Tensor | None) -> int:
        """Arguments as those of `low_rank_backward_cuda`, but for the workspace."""
        tables, (dx, *results) = rest[:5], rest[5:]
        call = self._call(x, dx if dx is not None else grad, tables)
        call.out = None if dx is None else dx.data_ptr()
        call.grad, call.grad_strides[:] = grad.data_ptr(), grad.stride()
        for name, each in zip(("d_down", "d_bias", "d_up", "d_strength"), results, strict=True):
            setattr(call, name, None if each is None else each.data_ptr())
        workspace = torch.full((self._workspace(ctypes.byref(call)),), torch.nan)
        call.workspace = workspace.data_ptr()
        return self.launch(call)

    def _call(self, x: Tensor, out: Tensor, tables) -> Call:
        down, bias, up, strength, index = tables
        return Call(
            dtype=DTYPES[x.dtype],
            sizes=(*x.shape, down.shape[1], len(down)),
            down=down.data_ptr(),
            bias=bias.data_ptr(),
            up=up.data_ptr(),
            strength=strength.data_ptr(),
            strength_strides=strength.stride(),
            index=index.data_ptr(),
            index_stride=index.stride(0),
            x=x.data_ptr(),
            out=out.data_ptr(),
            x_strides=x.stride(),
            out_strides=out.stride(),
        )
