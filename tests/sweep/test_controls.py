"""Random cells of the same size."""

import pytest
import tiny

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.sweep import Cell, random_cells, site_widths

WIDTHS = {**{f"a{n}": 8 for n in range(6)}, **{f"b{n}": 16 for n in range(3)}}
FOUND = [Cell("x", ("a0", "b0"), (0, 2), "cond", heads=(1,)), Cell("y", ("a0", "a1"), (2, 4))]


def test_sets_have_the_same_numbers_widths_and_selections() -> None:
    drawn = random_cells(FOUND, WIDTHS, count=50, seed=1)
    assert len(drawn) == 50 and drawn == random_cells(FOUND, WIDTHS, count=50, seed=1)
    assert drawn != random_cells(FOUND, WIDTHS, count=50, seed=2)
    seen: set[str] = set()
    for cells in drawn:
        for cell, old in zip(cells, FOUND, strict=True):
            assert [WIDTHS[site] for site in cell.sites] == [WIDTHS[site] for site in old.sites]
            assert (cell.steps, cell.branch, cell.heads) == (old.steps, old.branch, old.heads)
            assert cell.note == "random" and not set(cell.sites) & {"a0", "a1", "b0"}
            seen |= set(cell.sites)
        assert cells[0].sites[0] == cells[1].sites[0] != cells[1].sites[1]
    assert seen == {"a2", "a3", "a4", "a5", "b1", "b2"}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_where_sites_are_few_they_change_places(count: int) -> None:
    """Never a site for itself, never one twice, and the overlap is said."""
    found = [Cell(f"c{n}", f"s{n}") for n in range(count)]
    for spare in range(count):
        widths = {f"s{n}": 4 for n in range(count + spare)}
        for cells in random_cells(found, widths, count=20):
            sites = [cell.sites[0] for cell in cells]
            assert len(set(sites)) == count
            assert all(site != old.sites[0] for site, old in zip(sites, found, strict=True))
            shared = [cell for cell in cells if cell.note.startswith("random; 1 of 1 sites")]
            assert len(shared) == count - spare


def test_widths_are_seen_in_a_run() -> None:
    reader = Reader(tiny.pipeline("sd"))
    settings = {**tiny.arguments("sd", steps=1), "output_type": "latent"}
    widths = site_widths(reader, ["unet.mid_block", "unet.**.attn2:heads"], **settings)
    assert widths["unet.mid_block"] == 32
    assert widths["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2:heads"] == 16
    assert len(widths) == 8


def test_bad_input() -> None:
    with pytest.raises(InvalidInput, match="no cells with sites"):
        random_cells([Cell("x", ())], WIDTHS)
    with pytest.raises(InvalidInput, match="widths has no z"):
        random_cells([Cell("x", "z")], WIDTHS)
    with pytest.raises(InvalidInput, match="no other site has the 4 features of z"):
        random_cells([Cell("x", "z")], {**WIDTHS, "z": 4})
