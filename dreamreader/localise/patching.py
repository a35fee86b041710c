"""Patch grids and ablation grids: the effect of every cell, from prompts to a `Grid`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dreamreader._progress import Progress
from dreamreader.engine import Cache
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.localise.interventions import KINDS, ablate_edits, patch_edits
from dreamreader.sweep.cells import Cell
from dreamreader.sweep.grids import Grid
from dreamreader.sweep.run import Metric, check_pairs, job, over_cells, records_of, resolve_cells

if TYPE_CHECKING:
    from dreamreader.engine import Reader

DIRECTIONS = ("restore", "corrupt")


def patch_grid(
    reader: "Reader",
    clean: str | Sequence[str],
    corrupted: str | Sequence[str],
    cells: Sequence[Cell],
    *,
    metric: Metric,
    seeds: int | Sequence[int] = 0,
    direction: str = "restore",
    batch_size: int | None = None,
    confidence: float = 0.95,
    progress: Progress = True,
    **arguments: Any,
) -> Grid:
    """Puts each cell's values of one run into the other run of the pair, and measures the effect.

    Formula: `restore` runs the corrupted prompts with values of the clean run,
        effect = (M_patched - M_corrupted) / (M_clean - M_corrupted); `corrupt` runs the clean
        prompts with values of the corrupted run, effect = (M_patched - M_clean) /
        (M_corrupted - M_clean). Both are 0 where nothing changes and 1 for the whole way.

    Args:
        reader: the subject.
        clean, corrupted: prompts in pairs; both runs of a pair start from the same seed.
        cells: what is patched, one cell at a time; see `grid`.
        metric: from a `RunResult` to one number for each row; `rows[i].index` is the pair.
        seeds: as in `Reader.run`: a single pair with several seeds is as many rows.
        direction: `restore` or `corrupt`.
        batch_size: rows computed together; the whole sweep by default.
        confidence: of the intervals.
        progress: shown by default, or a function of a `ProgressEvent`, or False.
        arguments: passed on to the pipeline, such as `num_inference_steps`.

    Returns:
        The grid of values and effects.

    Raises:
        InvalidInput: no pairs, an empty grid, a metric that does not give one number a row.
        UnknownName: a site or the direction does not exist.

    Example:
        >>> cells = grid(reader, "unet.mid_block", windows=4, steps=20, branch="cond")
        >>> found = patch_grid(reader, "a red circle", "a blue circle", cells, metric=redness)
        >>> best = found.top(5)
    """
    if direction not in DIRECTIONS:
        raise UnknownName("direction", direction, DIRECTIONS)
    cells = resolve_cells(reader, cells)
    check_pairs(reader, clean, corrupted, cells, direction)
    donors, takers = (clean, corrupted) if direction == "restore" else (corrupted, clean)
    given = job(reader, donors, seeds, metric, batch_size, arguments)
    taking = job(reader, takers, seeds, metric, batch_size, arguments)
    result, goal = given.run(record=records_of(cells))
    _, base = taking.run()
    source = result.cache

    def edits_of(rows: list[Cell | None], pairs: list[int]) -> Sequence[Any]:
        return patch_edits(rows, source, pairs)

    values = over_cells(cells, taking, edits_of, progress)
    return Grid(tuple(cells), taking.rows, values, base, goal, direction, confidence)


def ablate_grid(
    reader: "Reader",
    prompts: str | Sequence[str],
    cells: Sequence[Cell],
    *,
    metric: Metric,
    kind: str = "zero",
    seeds: int | Sequence[int] = 0,
    floor: float | Sequence[float] | None = 0.0,
    reference: str | Sequence[str] | None = None,
    reference_seeds: int | Sequence[int] | None = None,
    direction: Tensor | Mapping[str, Tensor] | None = None,
    one_sided: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    confidence: float = 0.95,
    progress: Progress = True,
    **arguments: Any,
) -> Grid:
    """Ablates one cell at a time and measures how far the metric falls.

    Formula: effect = (M_ablated - M_base) / (floor - M_base): 0 no effect, 1 the metric is at its
        floor. With `floor=None` the plain difference M_ablated - M_base.

    Args:
        reader, prompts, seeds, cells, metric, batch_size, confidence, progress, arguments: see
            `patch_grid`.
        kind: `zero`, `mean`, `resample` or `project`; see `Ablate`.
        floor: value of the metric where the attribute is gone, one or one for each row.
        reference: prompts whose activations give the mean or the other row; those of the run
            itself by default. resample takes for each row another row of them, drawn from `seed`.
        reference_seeds: of the reference; those of the run by default.
        direction, one_sided: project: what is removed.

    Returns:
        The grid of values and effects.

    Raises:
        InvalidInput: the kind lacks what it needs, or an argument cannot be right.
        UnknownName: a site or the kind does not exist.
    """
    if kind not in KINDS:
        raise UnknownName("kind of ablation in a sweep", kind, KINDS)
    cells = resolve_cells(reader, cells)
    work = job(reader, prompts, seeds, metric, batch_size, arguments)
    goal = _floor(floor, len(work))
    source, donors = None, None
    if kind in ("mean", "resample"):
        other = prompts if reference is None else reference
        own_seeds = seeds if reference_seeds is None else reference_seeds
        source = _reference(reader, other, own_seeds, cells, batch_size, arguments)
        if kind == "resample":
            count = len(next(iter(source.values())).rows)
            donors = _donors(len(work), count, seed, own=reference is None)
    elif reference is not None:
        raise InvalidInput(f"ablate_grid: kind {kind!r} takes no reference")
    _, base = work.run()

    def edits_of(rows: list[Cell | None], pairs: list[int]) -> Sequence[Any]:
        taken = None if donors is None else [donors[pair] for pair in pairs]
        return ablate_edits(rows, kind, source, taken, direction, one_sided=one_sided)

    values = over_cells(cells, work, edits_of, progress)
    return Grid(tuple(cells), work.rows, values, base, goal, kind, confidence)


def _floor(floor: float | Sequence[float] | None, count: int) -> np.ndarray | None:
    if floor is None:
        return None
    found = np.asarray(floor, dtype=np.float64)
    if found.shape not in ((), (count,)):
        raise InvalidInput(f"floor has {list(found.shape)} values, the run has {count} rows")
    return np.broadcast_to(found, (count,)).copy()


def _reference(
    reader: "Reader", prompts: Any, seeds: Any, cells: Sequence[Cell], batch_size: Any, more: Any
) -> Cache:
    run = {"seeds": seeds, "batch_size": batch_size, "progress": False, **more}
    return reader.run(prompts, record=records_of(cells), **run).cache


def _donors(count: int, sources: int, seed: int, own: bool) -> list[int]:
    """For each row a row of the reference, the same for all cells; never itself."""
    if own and sources < 2:
        raise InvalidInput("resample needs a second row: give more prompts or seeds, or reference")
    found = []
    for row in range(count):
        draw = torch.Generator().manual_seed(seed + row)
        if own:
            shift = 1 + int(torch.randint(sources - 1, (), generator=draw))
            found.append((row + shift) % sources)
        else:
            found.append(int(torch.randint(sources, (), generator=draw)))
    return found
