"""Batches of rows, and their number."""

import pytest

from dreamreader.errors import InvalidInput
from dreamreader.experiments.methods.base import RowTable, check_size
from dreamreader.experiments.row import MOST, Row, Unit, evenly, turn_apart, units
from dreamreader.specs.data import Item


def rows(*groups: int) -> list[Row]:
    """Rows of groups of these sizes."""
    table = RowTable()
    for size in groups:
        for _ in range(size):
            table.add(Item("0", "a"), 0, "unedited")
        table.next_group()
    return table.rows


@pytest.mark.parametrize("count", [1, 2, 7, 48, 49])
@pytest.mark.parametrize("most", [1, 2, 3, 48])
def test_pieces_are_few_even_and_whole(count: int, most: int) -> None:
    sizes = [stop - start for start, stop in evenly(count, most)]
    assert sum(sizes) == count and max(sizes) <= most
    assert len(sizes) == -(-count // most) and max(sizes) - min(sizes) <= 1
    assert [start for start, _ in evenly(count, most)][1:] == [e for _, e in evenly(count, most)][
        :-1
    ]


@pytest.mark.parametrize(
    "prompts, turn",
    [("a", 0), ("ab", 1), ("aa", 1), ("aabb", 2), ("aaabbb", 3), ("abab", 1), ("aabbcc", 2)],
)
def test_rows_are_turned_to_those_of_other_prompts(prompts: str, turn: int) -> None:
    assert turn_apart(prompts) == turn


def test_rows_of_different_groups_share_no_batch() -> None:
    found = units(rows(3, 5, 1), 4)
    assert found == [Unit(0, 0, 3), Unit(1, 3, 5), Unit(2, 5, 8), Unit(3, 8, 9)]
    assert [row.number for row in found[2].of(rows(3, 5, 1))] == [5, 6, 7]


def test_a_row_knows_the_row_it_is_compared_with() -> None:
    table = RowTable()
    items = [Item("a", "x"), Item("b", "y", "z")]
    for item in items:
        for seed in (0, 1):
            table.add(item, seed, "unedited")
    changed = table.add(items[1], 1, "edited")
    assert changed.base == 3 and changed.columns()["base"] == 3
    assert table.add(items[1], 2, "edited").base is None
    assert table.add(items[1], 0, "target_prompt", target=True).prompt == "z"
    assert changed.columns()["source_prompt"] == "y"


def test_too_many_rows_are_refused_with_their_number() -> None:
    check_size(prompts=1000, seeds=1000)
    assert MOST == 1000 * 1000
    text = (
        r"the sweep has 10,000,000 rows \(1,000 prompts x 5 seeds x 2,000 cells\); a run has at m"
    )
    with pytest.raises(InvalidInput, match=text):
        check_size(prompts=1000, seeds=5, cells=2000, conditions=1)
