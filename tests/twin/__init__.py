"""The CUDA kernels on the CPU: their own source, compiled against stand-ins for CUDA headers."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dreamreader.ops.pack import STORED
from dreamreader.ops.program import decode

HERE = Path(__file__).parent
# Native instructions: like a GPU, they multiply and add with one rounding.
FLAGS = (
    "-std=c++20 -O1 -march=native -shared -fPIC -DDREAMREADER_CUDA=1 "
    "-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-class-memaccess -Wno-clobbered"
)
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
MASKS = {torch.bool: 1, torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}


LIBRARIES: dict[str, Path] = {}  # of each operator, compiled once


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


class WordsCall(ctypes.Structure):
    """As `Call` in attention_words.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "weights", "mask", "out")),
        ("dtype", ctypes.c_int64),
        ("mask_type", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 7),
        ("query_strides", ctypes.c_int64 * 4),
        ("key_strides", ctypes.c_int64 * 4),
        ("weight_strides", ctypes.c_int64 * 3),
        ("out_strides", ctypes.c_int64 * 4),
        ("mask_strides", ctypes.c_int64 * 4),
        ("causal", ctypes.c_int64),
        ("scale", ctypes.c_double),
    ]


class PackCall(ctypes.Structure):
    """As `Call` in pack.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "minus", "places", "groups")),
        *((name, ctypes.c_void_p) for name in ("out", "scales", "not_finite")),
        *((name, ctypes.c_int64) for name in ("source", "stored", "pool", "rows", "features")),
        ("x_strides", ctypes.c_int64 * 3),
        ("minus_strides", ctypes.c_int64 * 3),
    ]


class LowRankCall(ctypes.Structure):
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


def compiled(name: str, folder: Path) -> Callable[[ctypes.Structure], int]:
    """Compiles the twin of an operator; its function takes a call and returns the launches."""
    library = LIBRARIES.setdefault(name, folder / f"lib{name}.so")
    if not library.exists():
        compiler = shutil.which("g++")
        assert compiler
        source = str(HERE / f"{name}.cpp")
        command = [compiler, *FLAGS.split(), f"-I{HERE}", source, "-o", str(library)]
        subprocess.run(command, check=True)
    entry = ctypes.CDLL(str(library))[name]

    def launch(call: ctypes.Structure) -> int:
        launches, message = ctypes.c_int64(), ctypes.create_string_buffer(200)
        error = entry(ctypes.byref(call), ctypes.byref(launches), message, ctypes.c_size_t(200))
        assert error == 0, f"CUDA error {error}: {message.value.decode()}"
        return launches.value

    return launch


def limit_shared(name: str, size: int) -> None:
    """Lets the twin of an operator be a device whose blocks have `size` bytes of shared memory."""
    ctypes.CDLL(str(LIBRARIES[name])).limit_shared(ctypes.c_int64(size))


def build_words(folder: Path) -> Callable[..., int]:
    """The launcher of the attention maps of words; it gives the number of launches."""
    launch = compiled("attention_words", folder)

    def attention_words(
        out: Tensor, query: Tensor, key: Tensor, weights: Tensor, mask, causal: bool, scale: float
    ) -> int:
        batch, heads, queries, width = query.shape
        groups = max(heads // max(key.shape[1], 1), 1)
        call = WordsCall(
            query=query.data_ptr(),
            key=key.data_ptr(),
            weights=weights.data_ptr(),
            out=out.data_ptr(),
            dtype=DTYPES[query.dtype],
            sizes=(batch, heads, queries, key.shape[2], width, weights.shape[1], groups),
            query_strides=query.stride(),
            key_strides=key.stride(),
            weight_strides=weights.expand(batch, -1, -1).stride(),
            out_strides=out.stride(),
            causal=causal,
            scale=scale,
        )
        if mask is not None:
            call.mask, call.mask_type = mask.data_ptr(), MASKS[mask.dtype]
            call.mask_strides[:] = mask.stride()
        return launch(call)

    return attention_words


def build_pack(folder: Path) -> Callable[..., int]:
    """The launcher of the packing, with the operator's arguments; it gives the launches."""
    launch = compiled("pack", folder)

    def pack(out: Tensor, scales, not_finite, x: Tensor, places, minus, groups, pool: int) -> int:
        named = {"minus": minus, "groups": groups, "scales": scales, "not_finite": not_finite}
        call = PackCall(
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


class LowRankTwin:
    """The launchers of the low-rank edit and its gradient, as `dreamreader._C` has them."""

    def __init__(self, folder: Path) -> None:
        self.launch = compiled("low_rank", folder)
        library = ctypes.CDLL(str(LIBRARIES["low_rank"]))
        self._workspace = library.workspace
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

    def _call(self, x: Tensor, out: Tensor, tables) -> LowRankCall:
        down, bias, up, strength, index = tables
        return LowRankCall(
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


def build(folder: Path) -> Callable[..., int]:
    """The launcher of the intervention program; it gives the number of launches."""
    launch = compiled("intervention", folder)

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
