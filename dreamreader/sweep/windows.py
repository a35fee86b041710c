"""Windows of layers: a few layers in a row as one cell, one for each start."""

from collections.abc import Sequence

from dreamreader.errors import InvalidInput
from dreamreader.sweep.cells import Cell


def layer_windows(
    layers: Sequence[Sequence[str]], span: int = 3, branch: str | Sequence[str] | None = None
) -> list[Cell]:
    """Gives one cell for each start: the sites of `span` layers in a row.

    The last `span - 1` starts have fewer layers: they are kept, and their `note` says so.

    Args:
        layers: sites of each layer, in order.
        span: layers in a window.
        branch: of the cells.

    Raises:
        InvalidInput: there are fewer layers than that, or the window is not positive.

    Example:
        >>> [cell.label for cell in layer_windows([["0"], ["1"], ["2"]], span=2)]
        ['layers 0–1', 'layers 1–2', 'layer 2 · partial: 1 of 2 layers']
    """
    found = list(layers)
    if not 1 <= span <= len(found):
        raise InvalidInput(f"span={span} must be between 1 and the {len(found)} layers")
    cells = []
    for start in range(len(found)):
        chosen = found[start : start + span]
        last = start + len(chosen) - 1
        name = f"layer {start}" if last == start else f"layers {start}–{last}"
        note = "" if len(chosen) == span else f"partial: {len(chosen)} of {span} layers"
        sites = tuple(site for layer in chosen for site in layer)
        cells.append(Cell(name, sites, branch=branch, note=note))  # pyright: ignore
    return cells
