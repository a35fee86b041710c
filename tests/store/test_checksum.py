"""CRC-32C of rows: known sums, and every kernel against the reference in numpy."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from dreamreader._register import native
from dreamreader.store.checksum import crc32c, crc32c_reference

# RFC 3720, appendix B.4.
KNOWN = {
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
    b"123456789": 0xE3069283,
}


def drawn(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(rows + width).integers(0, 256, (rows, width), dtype=np.uint8)


@pytest.mark.parametrize("function", [crc32c, crc32c_reference])
@pytest.mark.parametrize("text", KNOWN, ids=lambda text: text.hex()[:8])
def test_known_sums(function, text: bytes):
    assert function(np.frombuffer(text, dtype=np.uint8)[None])[0] == KNOWN[text]


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 9])
def test_kernels_give_the_sums_of_the_reference(isa, rows: int):
    for width in (0, 1, 7, 8, 9, 64, 77):
        parts = (drawn(rows, width), drawn(rows, 16), drawn(rows, 4))
        for count in (1, 2, 3):
            assert np.array_equal(crc32c(*parts[:count]), crc32c_reference(*parts[:count]))


def test_rows_may_be_apart_in_memory(isa):
    wide = drawn(9, 100)
    for part in (wide[:, 3:40], wide[::2, :30], wide[:, ::3], wide.T):
        assert np.array_equal(crc32c(part), crc32c_reference(part))


def test_a_mapped_file_is_read_in_place(isa, tmp_path: Path):
    data = drawn(6, 512)
    data.tofile(tmp_path / "rows")
    with open(tmp_path / "rows", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    rows = np.frombuffer(mapped, dtype=np.uint8).reshape(6, 512)
    assert np.array_equal(crc32c(rows), crc32c_reference(data))


def test_one_changed_bit_changes_the_sum(isa):
    rows = drawn(4, 100)
    changed = rows.copy()
    changed[2, 57] ^= 16
    assert (crc32c(rows) != crc32c(changed)).tolist() == [False, False, True, False]


def test_what_is_not_bytes_of_rows_is_refused():
    module = native()[0]
    if module is None:
        pytest.skip("the native module is not built")
    with pytest.raises(ValueError, match="the parts must be bytes"):
        module.crc32c([np.zeros((2, 3), dtype=np.int32)], np.zeros(2, dtype=np.uint32))
    with pytest.raises(ValueError, match="the parts must be bytes"):
        module.crc32c([np.zeros((3, 3), dtype=np.uint8)], np.zeros(2, dtype=np.uint32))
    with pytest.raises(ValueError, match="dense uint32"):
        module.crc32c([np.zeros((2, 3), dtype=np.uint8)], np.zeros(2, dtype=np.uint64))
