"""Cross-attention windows (LocoGen): another prompt's text into a few layers in a row."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dreamreader.engine import Cache, RunResult, Site, join, parse
from dreamreader.errors import InvalidInput
from dreamreader.localise.interventions import patch_edits
from dreamreader.sweep.axes import run_order
from dreamreader.sweep.cells import Cell
from dreamreader.sweep.grids import Grid, Values
from dreamreader.sweep.run import Job, Metric, check_pairs, job, over_cells, records_of
from dreamreader.sweep.windows import layer_windows

if TYPE_CHECKING:
    from dreamreader.engine import Reader

_DENOISERS = ("unet", "transformer")


def text_layers(reader: "Reader") -> list[tuple[str, str]]:
    """The sites (keys, values) of the text at each attention layer that reads it, as they run.

    Cross-attention gives `attn2:k` and `attn2:v`; an MM-DiT whose text stream has projections of
    its own gives `attn:k.text` and `attn:v.text`.

    Raises:
        InvalidInput: the denoiser has no such layers, such as one that keeps text and image in one
            sequence with common projections.
    """
    parts = [name for name in _DENOISERS if getattr(reader.subject, name, None) is not None]
    found = [site for part in parts for site in reader.sites(f"{part}.**")]
    layers = [(site, stream) for site in found if (stream := _stream(site)) is not None]
    if not layers:
        raise InvalidInput(
            f"{type(reader.subject).__name__} has no attention layer with keys and values of the "
            "text alone, so there is no window to swap"
        )
    layers.sort(key=lambda layer: run_order(layer[0].path))
    return [
        (join(site.path, "k", stream or None), join(site.path, "v", stream or None))
        for site, stream in layers
    ]


def window_cells(
    reader: "Reader",
    span: int = 3,
    *,
    layers: Sequence[tuple[str, ...]] | None = None,
    branch: str | Sequence[str] | None = "cond",
) -> list[Cell]:
    """Gives one cell for each start: keys and values of the text in `span` layers in a row.

    The last `span - 1` starts have fewer layers: they are kept, and their `note` says so.

    Args:
        reader: whose denoiser is meant.
        span: layers in a window.
        layers: sites of each layer; those of `text_layers` by default.
        branch: of the cells.

    Raises:
        InvalidInput: the window is longer than the model is deep, or not positive.

    Reference:
        Basu et al. (2024), On mechanistic knowledge localization in text-to-image generative
        models, section 4.
    """
    found = text_layers(reader) if layers is None else list(layers)
    return layer_windows(found, span, branch)


def window_grid(
    reader: "Reader",
    prompts: str | Sequence[str],
    targets: str | Sequence[str],
    *,
    metric: Metric,
    span: int = 3,
    cells: Sequence[Cell] | None = None,
    seeds: int | Sequence[int] = 0,
    batch_size: int | None = None,
    confidence: float = 0.95,
    **arguments: Any,
) -> Grid:
    """Gives the target's text to one window of layers at a time, the original text to the others.

    Formula: effect = (M_window - M_original) / (M_target - M_original), one for each start.

    Args:
        reader: the subject, a pipeline.
        prompts, targets: original and target prompts in pairs.
        metric, seeds, batch_size, confidence, arguments: see `patch_grid`.
        span, cells: the windows; `window_cells(reader, span)` by default.

    Raises:
        InvalidInput: the pairs do not fit, or the denoiser has no such layers.
    """
    check_pairs(reader, targets, prompts)
    chosen = window_cells(reader, span) if cells is None else list(cells)
    given = job(reader, targets, seeds, metric, batch_size, arguments)
    taking = job(reader, prompts, seeds, metric, batch_size, arguments)
    _, goal, source = _target_run(given, chosen)
    _, base = taking.run()
    values = over_cells(chosen, taking, lambda rows, pairs: patch_edits(rows, source, pairs))
    return Grid(tuple(chosen), taking.rows, values, base, goal, "window", confidence)


def window_source(
    reader: "Reader",
    targets: str | Sequence[str],
    cells: Sequence[Cell],
    *,
    seeds: int | Sequence[int] = 0,
    batch_size: int | None = None,
    **arguments: Any,
) -> tuple[RunResult, Cache | Mapping[str, Tensor]]:
    """Runs the target prompts and gives the run and what `patch_edits` takes of it.

    Keys and values of cross-attention depend on the text alone: of these the first step is kept,
    {site: [rows, tokens, features]}. The text stream of an MM-DiT changes with every step, so there
    it is a cache of all steps.
    """
    work = job(reader, targets, seeds, lambda run: [0.0] * len(run.rows), batch_size, arguments)
    result, _, source = _target_run(work, cells)
    return result, source


def _target_run(
    work: Job, cells: Sequence[Cell]
) -> tuple[RunResult, Values, Cache | Mapping[str, Tensor]]:
    wanted = records_of(cells)
    one_branch = all(isinstance(cell.branch, str) for cell in cells)
    if not one_branch or not all(_is_constant(site) for each in wanted for site in each.sites):
        result, values = work.run(record=wanted)
        return result, values, result.cache
    first = [replace(each, steps=_First()) for each in wanted]
    result, values = work.run(record=first)
    tensors = {name: each.tensor[:, 0].flatten(2) for name, each in result.cache.items()}
    return result, values, tensors


class _First:
    """Selects the first step that is asked about: a run may begin on the way (img2img)."""

    def __init__(self):
        self.step: int | None = None

    def __call__(self, step: int) -> bool:
        self.step = step if self.step is None else self.step
        return step == self.step


def _is_constant(site: str) -> bool:
    """Whether the values depend on the text alone: keys and values of cross-attention."""
    return parse(site).port in ("k", "v") and parse(site).stream is None


def _stream(site: Site) -> str | None:
    """`text` where the text has keys of its own, empty in cross-attention, else None."""
    if "k.text" in site.ports:
        return "text"
    module = site.tap.module
    crosses = getattr(module, "is_cross_attention", False) is True
    return "" if crosses and "k" in site.ports else None
