"""Effects, tests and tables of a grid, from values that are known."""

import math
from pathlib import Path

import numpy as np
import pytest

from dreamreader.engine import Box, Row
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.sweep import Cell, Grid, joined, matrix_cells

NAN = float("nan")
ROWS = 8


def made(seed: int = 0, goal: bool = True, shares: tuple[float, ...] = (1.0, 0.5, 0.0)) -> Grid:
    """Cells that move each row by a known share of the way."""
    rng = np.random.default_rng(seed)
    base, way = rng.normal(size=ROWS), rng.uniform(0.5, 1.5, ROWS)
    values = np.stack([base + share * way for share in shares])
    cells = tuple(Cell(f"c{n}", "unet.conv_in", (n % 2, n % 2 + 1)) for n in range(len(shares)))
    rows = tuple(Row(n, "a", n) for n in range(ROWS))
    return Grid(cells, rows, values, base, base + way if goal else None, "restore")


def test_effects_are_shares_of_the_way() -> None:
    grid = made()
    assert [each.value for each in grid.effects] == pytest.approx([1.0, 0.5, 0.0])
    assert [each.low for each in grid.effects] == pytest.approx([1.0, 0.5, 0.0])
    assert grid.p_values.tolist() == [2 / 256, 2 / 256, 1.0]
    assert grid.q_values.tolist() == pytest.approx([3 / 256, 3 / 256, 1.0])
    assert grid.corrected("holm").tolist() == pytest.approx([6 / 256, 6 / 256, 1.0])
    assert [cell.name for cell in grid.top(2)] == ["c0", "c1"]
    assert grid.effect(grid.cells[1]).n == ROWS


def test_the_effect_is_a_ratio_of_means() -> None:
    grid = made()
    values, goal = grid.values.copy(), grid.goal
    assert goal is not None
    values[1] += np.linspace(-1, 1, ROWS)
    found = Grid(grid.cells, grid.rows, values, grid.base, goal, "restore").effects[1]
    assert found.value == pytest.approx(
        float((values[1] - grid.base).mean() / (goal - grid.base).mean())
    )
    assert found.low < 0.5 < found.high


def test_without_a_goal_effects_are_differences() -> None:
    grid = made(goal=False)
    expected = float((grid.values[0] - grid.base).mean())
    assert grid.effects[0].value == pytest.approx(expected)
    assert not grid.heat_map().percent and grid.heat_map().limit == pytest.approx(expected)


def test_rows_without_a_measurement_are_left_out_and_counted() -> None:
    grid = made()
    grid.values[0, :3] = NAN
    grid.values[2] = NAN
    grid.base[7] = NAN
    assert [each.n for each in grid.effects] == [4, 7, 0]
    assert grid.effects[0].value == pytest.approx(1.0) and math.isnan(grid.effects[2].value)
    assert grid.p_values[0] == 2 / 16 and math.isnan(grid.p_values[2])
    assert [cell.name for cell in grid.top(3)] == ["c0", "c1", "c2"]
    assert "8 rows not measured everywhere" in repr(grid)
    assert grid.heat_map().lines[2][1][0]["note"] == "not measured"


def test_tables_are_plain_and_heat_maps_bracket_what_may_be_chance() -> None:
    grid = made()
    row = grid.as_rows()[1]
    assert row["label"] == "c1 · step 1" and row["steps"] == [1, 2] and row["kind"] == "restore"
    assert row["effect"] == pytest.approx(0.5) and row["q"] == pytest.approx(3 / 256)
    shown = grid.heat_map("Colour")
    assert shown.rows == ["c0", "c1", "c2"] and shown.columns == ["step 0", "step 1"]
    texts = [cell["text"] for _, line in shown.lines for cell in line]
    assert texts == ["100", "–", "–", "50", "(0)", "–"]
    assert shown.lines[1][1][1]["note"] == "50 % (50 to 50), q = 0.012"


def test_agreement_is_that_of_the_effects() -> None:
    shares = (1.0, 0.5, 0.0, 0.25)
    same = made(0, shares=shares).agreement(made(1, shares=shares))
    assert (same.spearman, same.kendall, same.n) == pytest.approx((1.0, 1.0, 4))
    other = made(0, shares=shares).agreement(made(1, shares=shares[::-1]))
    assert other.spearman == pytest.approx(-0.6)
    with pytest.raises(InvalidInput, match="same cells, got 4 and 3 of which 3 are shared"):
        made(0, shares=shares).agreement(made(1))


def test_joined_grids_are_one_of_all_rows() -> None:
    whole = joined([made(0), made(1)])
    assert len(whole.rows) == 2 * ROWS and whole.effects[1].value == pytest.approx(0.5)
    assert whole.p_values[0] == pytest.approx(2 / 2**16, abs=2e-4)
    with pytest.raises(InvalidInput, match="joined: no grids"):
        joined([])
    with pytest.raises(InvalidInput, match="differ in cells, kind or goal"):
        joined([made(0), made(0, goal=False)])


def test_bad_input() -> None:
    grid = made()
    with pytest.raises(InvalidInput, match=r"3 cells and 8 rows, values are \[2, 8\]"):
        Grid(grid.cells, grid.rows, grid.values[:2], grid.base, grid.goal, "restore")
    with pytest.raises(UnknownName, match="unknown correction 'bonferroni'"):
        grid.corrected("bonferroni")
    with pytest.raises(UnknownName, match="unknown cell 'c9'"):
        grid.effect(Cell("c9", "unet.conv_in"))


def test_a_grid_is_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    for goal in (True, False):
        grid = made(goal=goal)
        grid.values[1, 2] = NAN
        cells = (
            Cell("a", ("unet.conv_in", "unet.conv_out"), (0, 3), ("cond", "uncond"), (1, -1), (0,)),
            Cell("b", "unet.conv_in", tokens=Box(0.0, 0.25, 0.5, 1.0), note="cut"),
            Cell("c", (), coordinates={"layers": (3, 5), "share": 0.1}),
        )
        rows = (Row(0), *grid.rows[1:])
        kept = Grid(cells, rows, grid.values, grid.base, grid.goal, "restore", 0.9)
        kept.save(tmp_path / "grid.safetensors")
        found = Grid.load(tmp_path / "grid.safetensors")
        assert (found.cells, found.rows, found.kind) == (cells, rows, "restore")
        assert found == kept and found != made()
        assert found.confidence == 0.9 and (found.goal is None) == (not goal)
        for name in ("values", "base", "goal"):
            a, b = getattr(kept, name), getattr(found, name)
            assert a is b is None or (a.dtype == b.dtype and a.tobytes() == b.tobytes())
        assert repr(found.effects) == repr(kept.effects)  # NaN too


@pytest.mark.parametrize("n", [-1, 1.5, True])
def test_the_top_is_a_number_of_cells(n: object) -> None:
    with pytest.raises(InvalidInput, match="top: n must be an integer of at least 0, got"):
        made().top(n)  # pyright: ignore[reportArgumentType]
    assert made().top(0) == []


def test_a_damaged_grid_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.safetensors"
    made().save(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InvalidInput, match="grid.safetensors"):
            Grid.load(path)
    with pytest.raises(FileNotFoundError):
        Grid.load(tmp_path / "other.safetensors")


def test_a_matrix_of_sites_is_a_heat_map() -> None:
    cells = matrix_cells(["0", "1"], ["2", "3"])
    rng = np.random.default_rng(0)
    base, rows = rng.normal(size=ROWS), tuple(Row(n) for n in range(ROWS))
    values = base + np.array([0.1, 0.2, 0.3, 0.4])[:, None]
    grid = Grid(tuple(cells), rows, values, base, base + 1, "restore")
    shown = grid.heat_map(rows="source", columns="target")
    assert (shown.rows, shown.columns) == (["0", "1"], ["2", "3"])
    np.testing.assert_allclose(shown.values, [[0.1, 0.2], [0.3, 0.4]])
    with pytest.raises(InvalidInput, match="'0 → 2' and '0 → 3' have one source and one time"):
        grid.heat_map(rows="source")
    with pytest.raises(UnknownName, match="unknown coordinate of a cell 'edge'"):
        grid.heat_map(rows="edge")
