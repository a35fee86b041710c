"""Cells that lie between two sites: an edge list, and a matrix of sites by sites."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from dreamreader.engine import parse
from dreamreader.errors import InvalidInput
from dreamreader.sweep.cells import ARROW, Cell


def edge_cells(edges: Iterable[tuple[str, str]], **selection: Any) -> list[Cell]:
    """Gives one cell for each edge, with `source` and `target` among its coordinates.

    What a row changes is at the target, which is the cell's only site. The source can be a site of
    another model.

    Args:
        edges: pairs of site strings (source, target).
        selection: steps, branch, tokens and heads of all cells.

    Raises:
        InvalidInput: there are no edges, one is no pair of sites, or one comes twice.

    Example:
        >>> cells = edge_cells([("layers.0", "layers.1"), ("layers.0", "layers.2")])
        >>> cells[1].name, cells[1].coordinate("source"), cells[1].sites
        ('layers.0 → layers.2', 'layers.0', ('layers.2',))
    """
    cells: dict[tuple[str, str], Cell] = {}
    for number, edge in enumerate(edges):
        if isinstance(edge, str) or len(edge) != 2 or not all(isinstance(e, str) for e in edge):
            raise InvalidInput(f"edge {number}: a pair of sites (source, target), got {edge!r}")
        source, target = edge
        if (source, target) in cells:
            raise InvalidInput(f"edge {number}: {source}{ARROW}{target} comes twice")
        parse(source)
        ends = {"source": source, "target": target}
        name = ARROW.join(edge)
        cells[source, target] = Cell(name, (target,), coordinates=ends, **selection)
    if not cells:
        raise InvalidInput("edge_cells: there are no edges")
    return list(cells.values())


def matrix_cells(
    sources: str | Sequence[str], targets: str | Sequence[str], **selection: Any
) -> list[Cell]:
    """Gives one cell for each pair of a source and a target site, row by row of the matrix.

    Args:
        sources, targets: site strings; `Grid.heat_map(rows="source", columns="target")` shows them.
        selection: steps, branch, tokens and heads of all cells.

    Raises:
        InvalidInput: one side has no sites, or a site comes twice.
    """
    sides = [[each] if isinstance(each, str) else list(each) for each in (sources, targets)]
    return edge_cells(product(sides[0], sides[1]), **selection)
