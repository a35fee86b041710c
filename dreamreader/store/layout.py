"""How a store lies on disk: names, and where everything is in a shard. docs/store.md says it whole.

STORE/
  manifest.json          what was asked for, of which subject; sites; what is complete
  index.parquet          one line for each run of rows with one site, step and branch
  shards/000000/         a sealed unit; folders whose name starts with "." are not sealed
    unit.json            its files, with rows, bytes and checksums
    samples.parquet      prompt, seed and further columns of each sample
    <site>.safetensors   the rows of one site: a shard
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from jaxtyping import Float

from dreamreader.errors import InvalidInput

FORMAT = 1
HEADER = 8192  # bytes before the values; a multiple of the blocks of O_DIRECT
BLOCK = 4096
KEYS = ("sample", "moment", "branch", "token")  # columns of `keys`, int32
MOMENTS = ("step", "evaluation", "timestep", "sigma", "fraction", "left_out", "not_finite")
SEGMENTS = ("moment", "branch", "first", "rows")  # columns of `segments`, int32
STORED = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
}
SCALED = (torch.float8_e4m3fn, torch.int8)  # with a float32 scale for each row
MOST_ROWS = 2**31 - 1  # of a shard, as segments count them in int32
POOLED = -1  # token of a row that was pooled over tokens


@dataclass(frozen=True)
class SiteLayout:
    """What the rows of one site are.

    Attributes:
        name: of the site. width: features of a row, heads side by side.
        stored: dtype on disk. source: dtype in the model.
        heads: where the site has them. hw: grid of the tokens where they are places of the picture.
        pool: `none`, `mean` or `max` over the tokens.
    """

    name: str
    width: int
    stored: torch.dtype
    source: torch.dtype
    heads: int | None = None
    hw: tuple[int, int] | None = None
    pool: str = "none"

    @property
    def file(self) -> str:
        return file_of(self.name)

    @property
    def row_bytes(self) -> int:
        return self.width * self.stored.itemsize

    @property
    def scaled(self) -> bool:
        return self.stored in SCALED

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "width": self.width,
            "stored": str(self.stored).removeprefix("torch."),
            "source": str(self.source).removeprefix("torch."),
            "heads": self.heads,
            "hw": None if self.hw is None else list(self.hw),
            "pool": self.pool,
        }


def site_from(content: dict) -> SiteLayout:
    """The site that `as_dict` described."""
    hw = content["hw"]
    return SiteLayout(
        content["name"],
        int(content["width"]),
        getattr(torch, content["stored"]),
        getattr(torch, content["source"]),
        content["heads"],
        None if hw is None else (hw[0], hw[1]),
        content["pool"],
    )


@dataclass(frozen=True)
class Moment:
    """When rows were taken; the numbers are NaN for what runs outside the denoising."""

    step: int
    evaluation: int
    timestep: float
    sigma: float
    fraction: float


def moments_table(
    moments: Sequence[Moment], left_out: Mapping[int, int], not_finite: Mapping[int, int]
) -> Float[np.ndarray, "moments 7"]:
    """The table `moments` of a shard.

    Args:
        moments: of the unit. left_out, not_finite: rows of the shard's site by moment.
    """
    rows = [
        (*astuple(moment), left_out.get(number, 0), not_finite.get(number, 0))
        for number, moment in enumerate(moments)
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, len(MOMENTS))


@dataclass(frozen=True)
class Tensors:
    """First byte of each tensor of a shard, counted from the start of the file, and its length."""

    values: int
    keys: int
    scales: int
    checksums: int
    segments: int
    moments: int
    bytes: int


def tensors_of(site: SiteLayout, rows: int, segments: int, moments: int) -> Tensors:
    """Where the tensors of a shard are. All but `values` start at a multiple of 8."""
    values = HEADER
    keys = values + -(-rows * site.row_bytes // 8) * 8
    scales = keys + rows * 16
    checksums = scales + -(-(rows * 4 if site.scaled else 0) // 8) * 8
    after = checksums + -(-rows * 4 // 8) * 8
    moments_at = after + segments * 16
    return Tensors(
        values, keys, scales, checksums, after, moments_at, moments_at + moments * 8 * len(MOMENTS)
    )


def header_of(
    site: SiteLayout, rows: int, segments: int, moments: int, branches: list[str], run: str
) -> bytes:
    """The safetensors header of a shard: HEADER bytes, padded with spaces.

    Args:
        site: of the shard. rows, segments, moments: how many it has.
        branches: names that the keys' branch numbers stand for.
        run: digest of the fingerprint.

    Raises:
        InvalidInput: there are more rows than segments can count, or the names are too long.
    """
    if rows > MOST_ROWS:
        raise InvalidInput(
            f"{site.name}: a shard has {MOST_ROWS:,} rows at most, not {rows:,}; "
            "make units of fewer samples"
        )
    at = tensors_of(site, rows, segments, moments)
    shapes: list[tuple[str, str, list[int], int]] = [
        ("values", STORED[site.stored], [rows, site.width], at.values),
        ("keys", "I32", [rows, len(KEYS)], at.keys),
        *([("scales", "F32", [rows], at.scales)] if site.scaled else []),
        ("checksums", "U32", [rows], at.checksums),
        ("segments", "I32", [segments, len(SEGMENTS)], at.segments),
        ("moments", "F64", [moments, len(MOMENTS)], at.moments),
    ]
    own = {"format": FORMAT, "run": run, "site": site.as_dict(), "branches": branches}
    content: dict[str, object] = {"__metadata__": {"dreamreader.shard": json.dumps(own)}}
    end, pads = 0, 0
    for name, kind, shape, start in shapes:
        if start - HEADER > end:  # safetensors allows no gaps
            content[f"pad{pads}"] = _entry("U8", [start - HEADER - end], end, start - HEADER)
            pads += 1
        end = start - HEADER + _bytes(kind, shape)
        content[name] = _entry(kind, shape, start - HEADER, end)
    text = json.dumps(content, separators=(",", ":")).encode()
    if len(text) > HEADER - 8:
        raise InvalidInput(
            f"{site.name}: its name and those of {len(branches)} branches need {len(text)} bytes, "
            f"the header of a shard has {HEADER - 8}"
        )
    return (HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8)


def file_of(site: str) -> str:
    """The file of a site within a unit; a colon cannot be in the name of a file everywhere."""
    return site.replace(":", "@") + ".safetensors"


def unit_folder(unit: int) -> str:
    return f"{unit:06d}"


def is_sealed(name: str) -> bool:
    """Whether a folder in shards/ is a sealed unit."""
    return re.fullmatch(r"\d{6,}", name) is not None


def check_format(where: object, found: object) -> None:
    """Refuses what a newer version wrote.

    Raises:
        InvalidInput: the format is not one that this version reads.
    """
    if not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise InvalidInput(
            f"{where} is of format {found}, this version of dreamreader reads up to {FORMAT}"
        )


def _bytes(kind: str, shape: list[int]) -> int:
    size = {"F64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1}
    count = size[kind]
    for each in shape:
        count *= each
    return count


def _entry(kind: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}
