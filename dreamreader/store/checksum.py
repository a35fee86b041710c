"""CRC-32C of rows: natively, else the reference in numpy, all rows at once, byte after byte."""

import numpy as np
from jaxtyping import UInt8, UInt32

from dreamreader._register import chosen_backend, native

_POLYNOMIAL = 0x82F63B78  # Castagnoli, bits reversed; RFC 3720, appendix B.4


def _table() -> UInt32[np.ndarray, "256"]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table.astype(np.uint32)


_TABLE = _table()


def crc32c(*parts: UInt8[np.ndarray, "rows _"]) -> UInt32[np.ndarray, " rows"]:
    """CRC-32C of every row of the parts, side by side.

    Args:
        parts: bytes, uint8 [rows, n], each with its own n.

    Example:
        >>> text = np.frombuffer(b"123456789", dtype=np.uint8)
        >>> hex(crc32c(text[None])[0])
        '0xe3069283'
    """
    module = native()[0] if chosen_backend() in (None, "native") else None
    if module is None:
        return crc32c_reference(*parts)
    found = np.empty(len(parts[0]), dtype=np.uint32)
    module.crc32c([_dense(part) for part in parts], found)
    return found


def crc32c_reference(*parts: UInt8[np.ndarray, "rows _"]) -> UInt32[np.ndarray, " rows"]:
    """The same in numpy."""
    found = np.full(len(parts[0]), 0xFFFFFFFF, dtype=np.uint32)
    for part in parts:
        for column in np.ascontiguousarray(part.T):
            found = _TABLE[(found ^ column) & 0xFF] ^ (found >> 8)
    return found ^ np.uint32(0xFFFFFFFF)


def _dense(part: UInt8[np.ndarray, "rows n"]) -> UInt8[np.ndarray, "rows n"]:
    """With the bytes of each row side by side; copies only where they are not."""
    return part if part.shape[1] <= 1 or part.strides[1] == 1 else np.ascontiguousarray(part)
