"""Controls: random sites of the same number and size as those that were found."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dreamreader.engine import Record
from dreamreader.errors import InvalidInput
from dreamreader.sweep.cells import Cell

if TYPE_CHECKING:
    from dreamreader.engine import Reader


def site_widths(
    reader: "Reader", sites: str | Sequence[str], prompt: str = "a", **arguments: Any
) -> dict[str, int]:
    """Gives the number of features of each site, seen in a run of one prompt.

    Args:
        reader: the subject.
        sites: site strings or globs.
        prompt: that is run; `arguments` are passed on to the pipeline (few steps will do).
    """
    patterns = [sites] if isinstance(sites, str) else list(sites)
    names = dict.fromkeys(name for each in patterns for name in reader.sites(each).names)
    records = [Record(name, reduce=lambda x: x[:, :1]) for name in names]
    found = reader.run(prompt, record=records, seeds=0, progress=False, **arguments).cache
    sizes = {}
    for name, each in found.items():
        kept = 2 if each.heads else 1  # heads and d_head, or features
        sizes[name] = int(each.tensor.shape[-kept:].numel())
    return sizes


def random_cells(
    cells: Sequence[Cell], widths: Mapping[str, int], count: int = 10, seed: int = 0
) -> list[list[Cell]]:
    """Gives sets of cells like `cells` at other sites: as many sites, of the same widths.

    In each set every site is replaced by one of its width, two sites never by the same one; steps,
    branch, tokens and heads stay. Sites outside `cells` are taken where they suffice; where not,
    the others of `cells` are used as well and the cell's `note` says so.

    Args:
        cells: those found, such as `Grid.top(5)`.
        widths: {site: features} of all sites that may be drawn; see `site_widths`.
        count: number of sets.
        seed: of the draws.

    Raises:
        InvalidInput: there are no cells, a site has no width, or no other site has its width.

    Example:
        >>> found = [Cell("a", "a")]
        >>> [cells[0].sites for cells in random_cells(found, {"a": 4, "b": 4, "c": 8}, count=2)]
        [('b',), ('b',)]
    """
    found = list(dict.fromkeys(site for cell in cells for site in cell.sites))
    if not found:
        raise InvalidInput("random_cells: no cells with sites are given")
    unknown = [site for site in found if site not in widths]
    if unknown:
        raise InvalidInput(f"random_cells: widths has no {unknown[0]}")
    drawn = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        places = _draw_site(found, widths, rng)
        drawn.append([_move(cell, places, set(found)) for cell in cells])
    return drawn


def _draw_site(found: list[str], widths: Mapping[str, int], rng: random.Random) -> dict[str, str]:
    """For each site another one of its width: outside `found` first, and each once."""
    places: dict[str, str] = {}
    for width in dict.fromkeys(widths[site] for site in found):
        mine = [site for site in found if widths[site] == width]
        every = [site for site in widths if widths[site] == width]
        outside = [site for site in every if site not in mine]
        if len(every) < 2:
            raise InvalidInput(f"random_cells: no other site has the {width} features of {mine[0]}")
        rng.shuffle(outside)
        rng.shuffle(mine)
        taken = outside[: len(mine)]
        left = mine[len(taken) :]
        places |= dict(zip(mine, taken, strict=False))
        # Those left over take the place of the one before them: never their own.
        before = [mine[len(taken) - 1], *left[:-1]]
        places |= dict(zip(left, before, strict=False))
    return places


def _move(cell: Cell, places: Mapping[str, str], found: set[str]) -> Cell:
    sites = tuple(places[site] for site in cell.sites)
    shared = sum(site in found for site in sites)
    note = f"random; {shared} of {len(sites)} sites were found too" if shared else "random"
    return replace(cell, name=f"random for {cell.name}", sites=sites, note=note)
