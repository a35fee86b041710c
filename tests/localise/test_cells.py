"""Cells and grids of them."""

import json

import pytest
import tiny
import torch

from dreamreader.engine import Box, Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.localise import Cell, grid
from dreamreader.localise.axes import block_of

ATTN = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(tiny.pipeline("sd"))


CELLS = [
    Cell("a", "unet.mid_block"),
    Cell("a", (ATTN, "unet.conv_in"), (0, 5), "cond", 3, (1,), "cut"),
    Cell("a", ATTN, steps=range(2, 3), branch=["cond", "uncond"], tokens=[1, -1]),
    Cell("a", ATTN, tokens="red"),
    Cell("a", ATTN, tokens=Box(0.0, 0.25, 0.5, 1.0)),
    Cell("none", ()),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.label)
def test_a_cell_goes_through_json(cell: Cell) -> None:
    back = Cell.from_dict(json.loads(json.dumps(cell.as_dict())))
    assert back == cell and hash(back) == hash(cell)


def test_labels_say_what_differs() -> None:
    assert [cell.label for cell in CELLS] == [
        "a",
        "a · head 1 · token 3 · steps 0–4 · cond · cut",
        "a · tokens 1, -1 · step 2 · cond+uncond",
        "a · word 'red'",
        "a · box 0 0.25 0.5 1",
        "none",
    ]


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"steps": (5, 5)}, r"0 <= start < stop, got \(5, 5\)"),
        ({"steps": (-1, 2)}, "0 <= start < stop"),
        ({"steps": "all"}, r"steps of a cell are \(start, stop\), got 'all'"),
        ({"tokens": torch.ones(3)}, "an index, indices, a word or a Box, got Tensor"),
        ({"tokens": []}, "tokens of a cell are indices, got \\[\\]"),
        ({"heads": [True]}, "heads of a cell are indices"),
        ({"sites": ("",)}, "empty part"),
    ],
)
def test_a_cell_refuses_what_cannot_be(arguments, text) -> None:
    with pytest.raises(InvalidInput, match=text):
        Cell(**{"name": "a", "sites": ATTN, **arguments})


def test_plain_values_of_another_form_are_refused() -> None:
    with pytest.raises(UnknownName, match="unknown field of a cell 'step'; nearest: steps"):
        Cell.from_dict({"name": "a", "sites": [ATTN], "step": 1})
    with pytest.raises(InvalidInput, match=r"a cell needs sites, got \['name'\]"):
        Cell.from_dict({"name": "a"})
    with pytest.raises(InvalidInput, match="'box': \\[left, top, right, bottom\\]"):
        Cell.from_dict({"name": "a", "sites": [ATTN], "tokens": {"box": [1, 2]}})


def test_a_grid_is_places_heads_tokens_windows(reader: Reader) -> None:
    cells = grid(
        reader, f"{ATTN}:heads", windows=2, steps=5, tokens=[0, (1, 2)], heads="each", branch="cond"
    )
    heads = reader.sites(f"{ATTN}:heads")[0].heads
    assert heads is not None and len(cells) == heads * 2 * 2 and len(set(cells)) == len(cells)
    assert [cell.steps for cell in cells[:2]] == [(0, 2), (2, 5)]
    assert [cell.tokens for cell in cells[:3:2]] == [0, (1, 2)]
    assert {cell.heads for cell in cells} == {(n,) for n in range(heads)}
    assert {cell.branch for cell in cells} == {"cond"}


def test_sites_are_grouped_in_the_order_of_the_run(reader: Reader) -> None:
    each = grid(reader, ["unet.**.attn2", ATTN])
    blocks = grid(reader, "unet.**.attn2", group="block")
    names = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert [cell.name for cell in blocks] == names
    assert [site for cell in blocks for site in cell.sites] == [cell.name for cell in each]
    assert grid(reader, "unet.**.attn2", group="all")[0].sites == tuple(c.name for c in each)
    own = grid(
        reader, "unet.**.attn2", group={"low": ["unet.mid_block.**", "unet.down_blocks.1.**"]}
    )
    assert own[0].sites == (*blocks[1].sites, *blocks[2].sites)


def test_blocks_of_other_models_have_names_too() -> None:
    assert block_of("transformer.transformer_blocks.3.attn:k.text") == "transformer_blocks.3"
    assert block_of("transformer.h.0.mlp") == "h.0"
    assert block_of("text_encoder.encoder.layers.2.mlp") == "text_encoder.layers.2"
    assert block_of("unet.conv_in") == "unet.conv_in"


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"sites": []}, "the grid is empty: no sites"),
        ({"windows": []}, "the grid is empty: an axis has no entries"),
        ({"windows": 4}, "windows=4 needs steps"),
        ({"windows": 9, "steps": 4}, "between 1 and the 4 steps"),
        ({"tokens": "each"}, "tokens='each' needs positions"),
        ({"heads": "each"}, "one number of heads, such as <attention>:heads, got .*attn2: none"),
        ({"sites": f"{ATTN}:heads", "heads": [99]}, "head 99 asked for, .* has "),
        ({"group": {"x": "unet.conv_in"}}, "group 'x' has none of the 1 sites"),
    ],
)
def test_a_grid_refuses_what_cannot_be(reader: Reader, arguments, text) -> None:
    with pytest.raises(InvalidInput, match=text):
        grid(reader, **{"sites": ATTN, **arguments})


def test_unknown_names_of_a_grid(reader: Reader) -> None:
    with pytest.raises(UnknownName, match="unknown grouping of sites 'blocks'; nearest: block"):
        grid(reader, ATTN, group="blocks")
    with pytest.raises(UnknownName, match="unknown choice of heads 'all'"):
        grid(reader, f"{ATTN}:heads", heads="all")
