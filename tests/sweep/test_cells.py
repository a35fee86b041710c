"""Cells and grids of them."""

import json

import pytest
import tiny
import torch

from dreamreader import localise, sweep
from dreamreader.engine import Box, Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.sweep import Cell, edge_cells, grid, layer_windows, matrix_cells
from dreamreader.sweep.axes import block_of

NAN = float("nan")
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
    Cell("pair", (), coordinates={"layers": (3, 5), "site": "unet.mid_block", "share": 0.5}),
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
        "pair · layers 3–5 · site unet.mid_block · share 0.5",
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
        ({"coordinates": {"edge": None}}, "coordinate 'edge' of a cell: a text, a number or a tup"),
        ({"coordinates": {"share": NAN}}, "coordinate 'share' of a cell: .*, got nan"),
        ({"coordinates": {"pair": ()}}, r"coordinate 'pair' of a cell: .*, got \(\)"),
        ({"coordinates": "edge"}, "coordinates of a cell are {name: value}, got 'edge'"),
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


def test_coordinates_tell_cells_apart_and_are_read_by_name() -> None:
    one, other = (Cell("mid", (), coordinates={"source": name}) for name in ("a", "b"))
    assert one != other and one.label != other.label and one.place != other.place
    assert one.coordinate("source") == "a"
    assert Cell("mid", ()) == Cell("mid", (), coordinates={})
    assert "coordinates" not in Cell("mid", ()).as_dict()  # files from before have none
    with pytest.raises(UnknownName, match="unknown coordinate of a cell 'sources'; nearest: sour"):
        one.coordinate("sources")


def test_edges_and_matrices_are_cells() -> None:
    found = matrix_cells(["0", "1"], ["2", "3"], steps=(0, 2))
    ends = [(cell.coordinate("source"), cell.coordinate("target")) for cell in found]
    assert ends == [("0", "2"), ("0", "3"), ("1", "2"), ("1", "3")]
    assert [cell.sites for cell in found] == [("2",), ("3",)] * 2
    assert found == edge_cells(ends, steps=(0, 2))
    assert found[1].label == "0 → 3 · steps 0–1"
    for edges, text in (
        ([], "there are no edges"),
        (["ab"], r"edge 0: a pair of sites \(source, target\), got 'ab'"),
        ([("0", "1"), ("0", "1")], "edge 1: 0 → 1 comes twice"),
    ):
        with pytest.raises(InvalidInput, match=text):
            edge_cells(edges)  # pyright: ignore


def test_windows_of_layers_are_cut_short_at_the_end() -> None:
    layers = [("0", "1"), ("2",), ("3",)]
    found = layer_windows(layers, span=2, branch="cond")
    assert [cell.sites for cell in found] == [("0", "1", "2"), ("2", "3"), ("3",)]
    assert [cell.note for cell in found] == ["", "", "partial: 1 of 2 layers"]
    with pytest.raises(InvalidInput, match="span=4 must be between 1 and the 3 layers"):
        layer_windows(layers, span=4)


def test_names_of_before_are_those_of_sweeps() -> None:
    for name in ("Agreement", "Cell", "Grid", "grid", "joined", "random_cells", "records_of"):
        assert getattr(localise, name) is getattr(sweep, name)
