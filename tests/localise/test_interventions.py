"""A mixed batch does to each row what its own cell alone would do."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from dreamreader.edits import Ablate, Box, Patch
from dreamreader.engine import Cache, Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.localise import Cell, ablate_edits, patch_edits, records_of

ATTN = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
UP = "unet.up_blocks.0.attentions.0"
SETTINGS = {**tiny.arguments("sd"), "output_type": "pt"}
CLEAN, CORRUPTED = ["a red cat", "a dog on a tree"], ["a blue cat", "a red dog in a tree"]
CELLS = [
    None,
    Cell("mid", ATTN, (1, 3), "cond"),
    Cell("both", (ATTN, UP), branch="cond"),
    Cell("head", f"{ATTN}:heads", (0, 2), "cond", heads=[1]),
    Cell("corner", UP, (2, 4), tokens=Box(0, 0, 0.5, 0.5)),
    Cell("token", f"{ATTN}:v", branch="cond", tokens=[2, 3]),
    Cell("nothing", ()),
]


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(tiny.pipeline("sd"))


@pytest.fixture(scope="module")
def source(reader: Reader) -> Cache:
    records = records_of([cell for cell in CELLS if cell is not None])
    return reader.run(CLEAN, record=records, seeds=[5, 6], **SETTINGS).cache


def rows() -> tuple[list[Any], list[str], list[int], list[int]]:
    cells = [cell for cell in CELLS for _ in CLEAN]
    return cells, CORRUPTED * len(CELLS), [5, 6] * len(CELLS), [0, 1] * len(CELLS)


def plain(reader: Reader) -> Tensor:
    _, prompts, seeds, _ = rows()
    return reader.run(prompts, seeds=seeds, **SETTINGS).images


def check_rows(reader: Reader, edits: Any, alone: Any) -> None:
    cells, prompts, seeds, pairs = rows()
    mixed = reader.run(prompts, edits=edits, seeds=seeds, **SETTINGS).images
    base = plain(reader)
    for row, cell in enumerate(cells):
        if cell is None or not cell.sites:
            assert torch.equal(mixed[row], base[row])
            continue
        one = reader.run(
            prompts[row], edits=alone(cell, pairs[row]), seeds=seeds[row], **SETTINGS
        ).images[0]
        effect = float((one - base[row]).abs().max())
        assert effect > 1e-4, cell.label
        error = float((one - mixed[row]).abs().max())
        assert error < max(1e-2 * effect, 5e-6), cell.label


def by_hand(cell: Cell) -> dict[str, Any]:
    tokens = list(cell.tokens) if isinstance(cell.tokens, tuple) else cell.tokens
    steps = None if cell.steps is None else list(range(*cell.steps))
    return {"steps": steps, "branch": cell.branch, "tokens": tokens, "heads": cell.heads}


def test_each_row_is_patched_at_its_own_cell(reader: Reader, source: Cache) -> None:
    cells, _, _, pairs = rows()

    def alone(cell: Cell, pair: int) -> list[Patch]:
        return [Patch(site, source, from_rows=pair, **by_hand(cell)) for site in cell.sites]

    edits = patch_edits(cells, source, pairs)
    assert len(edits) == 5
    check_rows(reader, edits, alone)


def test_batches_cut_the_sweep_anywhere(reader: Reader, source: Cache) -> None:
    cells, prompts, seeds, pairs = rows()
    edits = patch_edits(cells, source, pairs)
    whole = reader.run(prompts, edits=edits, seeds=seeds, **SETTINGS).images
    parts = reader.run(prompts, edits=edits, seeds=seeds, batch_size=5, **SETTINGS).images
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["zero", "mean", "resample", "project"])
def test_each_row_is_ablated_at_its_own_cell(reader: Reader, source: Cache, kind: str) -> None:
    cells, _, _, pairs = rows()
    extra: dict[str, Any] = {}
    if kind == "project":
        sites = {site for cell in cells if cell is not None for site in cell.sites}
        rng = torch.Generator().manual_seed(0)
        width = {s: source[s].tensor.shape[-1] * (source[s].heads or 1) for s in sites}
        extra["direction"] = {s: torch.randn(width[s], generator=rng) for s in sites}
    if kind in ("mean", "resample"):
        extra["source"] = source
    donors = [1 - pair for pair in pairs]

    def alone(cell: Cell, pair: int) -> list[Ablate]:
        own = {"from_rows": 1 - pair} if kind == "resample" else {}
        return [Ablate(site, kind, **extra, **own, **by_hand(cell)) for site in cell.sites]

    given = {"from_rows": donors} if kind == "resample" else {}
    check_rows(reader, ablate_edits(cells, kind, **extra, **given), alone)


def test_cells_that_differ_in_name_only_share_an_edit(source: Cache) -> None:
    first, second = Cell("a", ATTN, (0, 1)), Cell("b", ATTN, (0, 1), note="again")
    edits = patch_edits([first, None, second], source, [0, 0, 1])
    assert [edit.strength for edit in edits] == [[1.0, 0.0, 1.0]]


def test_no_cells_are_no_edits(source: Cache) -> None:
    assert patch_edits([None, Cell("x", ())], source) == []


def test_bad_input(source: Cache) -> None:
    cell = Cell("mid", ATTN)
    with pytest.raises(InvalidInput, match="cells_of_rows is empty"):
        patch_edits([], source)
    with pytest.raises(InvalidInput, match="row 1: a Cell or None expected, got str"):
        patch_edits([cell, "mid"], source)  # pyright: ignore
    with pytest.raises(
        InvalidInput, match="has no values of unet.conv_in, which the cell 'x' changes; it has "
    ):
        patch_edits([Cell("x", "unet.conv_in")], source)
    with pytest.raises(InvalidInput, match=r"no step of 'late · step 9' at .*attn2; it has 0, 1"):
        patch_edits([Cell("late", ATTN, steps=(9, 10))], source)
    with pytest.raises(InvalidInput, match="kind 'mean' needs source"):
        ablate_edits([cell], "mean")
    with pytest.raises(UnknownName, match="unknown kind of ablation in a sweep 'noise'"):
        ablate_edits([cell], "noise")
