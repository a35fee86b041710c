"""Grids of cells: places by heads, tokens and step windows."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from dreamreader.engine import parse
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.sweep.cells import Cell, indices_of, window_of

if TYPE_CHECKING:
    from dreamreader.engine import Reader

Group = str | Callable[[str], str] | Mapping[str, str | Sequence[str]]


def grid(
    reader: "Reader",
    sites: str | Sequence[str],
    *,
    group: Group = "each",
    windows: int | Sequence[Any] | None = None,
    steps: int | None = None,
    branch: str | Sequence[str] | None = None,
    tokens: Any = None,
    positions: int | None = None,
    heads: str | Sequence[Any] | None = None,
) -> list[Cell]:
    """Gives the cells of places x heads x tokens x windows, in this order.

    Args:
        reader: whose sites are meant.
        sites: site strings or globs; a site is taken once.
        group: which sites change together: `each` alone, by `block`, `all`, a function from site to
            name, or {name: globs}.
        windows: step windows: a number of equal ones (needs `steps`), or a list of (start, stop),
            ranges or single steps; None is one window over the whole run.
        steps: steps of the run, for a number of windows.
        branch: of all cells.
        tokens: one selection (an index, a word, a `Box`), a list of selections, each a cell of its
            own (several tokens together as a tuple), or `each` for all of `positions`.
        positions: number of tokens, for `each`.
        heads: `each`, or a list whose entries (a head, or several as a tuple) are cells.

    Returns:
        Cells whose `label`s differ.

    Raises:
        UnknownName: a glob matches nothing, or there is no such grouping.
        InvalidInput: the grid is empty, or an axis lacks what it needs.

    Example:
        >>> import torch
        >>> from dreamreader.engine import Reader
        >>> reader = Reader(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))
        >>> [cell.label for cell in grid(reader, "*", windows=[(0, 2), 2])]
        ['0 · steps 0–1', '0 · step 2', '1 · steps 0–1', '1 · step 2']
    """
    patterns = [sites] if isinstance(sites, str) else list(sites)
    found = {site.name: site for each in patterns for site in reader.sites(each)}
    if not found:
        raise InvalidInput("the grid is empty: no sites are given")
    places = _group(reader, sorted(found, key=run_order), group)
    times = _windows(windows, steps)
    selections = _selections(tokens, positions)
    cells = []
    for name, members in places.items():
        of_heads = _heads(heads, [found[each] for each in members])
        for chosen, selected, time in product(of_heads, selections, times):
            cells.append(Cell(name, tuple(members), time, _branch(branch), selected, chosen))
    if not cells:
        raise InvalidInput("the grid is empty: an axis has no entries")
    return cells


def block_of(site: str) -> str:
    """The block a site belongs to: its path up to the first number, without the component.

    Example:
        >>> block_of("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2")
        'down_blocks.1'
    """
    parts = parse(site).path.split(".")
    if "mid_block" in parts:
        return "mid_block"
    for number, part in enumerate(parts):
        if part.isdigit():
            head = parts[max(number - 1, 0) : number + 1]
            # blocks of a text encoder must not pass for those of the denoiser
            top = [parts[0]] if re.match(r"text_encoder|vae", parts[0]) else []
            return ".".join(top + head)
    return parse(site).path


def run_order(site: str) -> int:
    """Sorts the parts of a UNet as they run; the model lists `up_blocks` before the middle."""
    parts = parse(site).path.split(".")
    order = ("down_blocks", "mid_block", "up_blocks")
    return order.index(parts[1]) if len(parts) > 1 and parts[1] in order else 0


def _group(reader: "Reader", sites: list[str], group: Group) -> dict[str, list[str]]:
    if isinstance(group, Mapping):
        globs = {k: [v] if isinstance(v, str) else list(v) for k, v in group.items()}
        named = {k: {n for p in v for n in reader.sites(p).names} for k, v in globs.items()}
        found = {k: [site for site in sites if site in v] for k, v in named.items()}
        empty = [k for k, v in found.items() if not v]
        if empty:
            raise InvalidInput(f"group {empty[0]!r} has none of the {len(sites)} sites")
        return found
    rules: dict[str, Callable[[str], str]] = {
        "each": lambda site: site,
        "block": block_of,
        "all": lambda site: "all",
    }
    if isinstance(group, str) and group not in rules:
        raise UnknownName("grouping of sites", group, rules, "Or give a function or a mapping.")
    rule = rules[group] if isinstance(group, str) else group
    found = {}
    for site in sites:
        found.setdefault(str(rule(site)), []).append(site)
    return found


def _windows(windows: Any, steps: int | None) -> list[tuple[int, int] | None]:
    if windows is None:
        return [None]
    if not isinstance(windows, int):
        return [window_of(each) for each in windows]
    if steps is None:
        raise InvalidInput(f"windows={windows} needs steps, the number of steps of the run")
    if not 1 <= windows <= steps:
        raise InvalidInput(f"windows={windows} must be between 1 and the {steps} steps of the run")
    edges = [round(n * steps / windows) for n in range(windows + 1)]
    return list(zip(edges, edges[1:], strict=False))


def _selections(tokens: Any, positions: int | None) -> list[Any]:
    if tokens == "each":
        if positions is None:
            raise InvalidInput("tokens='each' needs positions, the number of tokens")
        return list(range(positions))
    return list(tokens) if isinstance(tokens, list | range) else [tokens]


def _heads(heads: Any, sites: Sequence[Any]) -> list[tuple[int, ...] | None]:
    if heads is None:
        return [None]
    counts = {site.heads for site in sites}
    if counts == {None} or len(counts) > 1:
        shown = ", ".join(f"{site.name}: {site.heads or 'none'}" for site in sites[:3])
        raise InvalidInput(
            f"heads need sites with one number of heads, such as <attention>:heads, got {shown}"
        )
    count = counts.pop()
    listed = list(range(count)) if isinstance(heads, str) and heads == "each" else heads
    if isinstance(listed, str):
        raise UnknownName("choice of heads", listed, ["each"])
    found: list[tuple[int, ...] | None] = [indices_of(each, "heads") for each in listed]
    beyond = [each for entry in found for each in entry or () if not -count <= each < count]
    if beyond:
        raise InvalidInput(f"head {beyond[0]} asked for, {sites[0].name} has {count}")
    return found


def _branch(branch: Any) -> Any:
    return branch if branch is None or isinstance(branch, str) else tuple(branch)
