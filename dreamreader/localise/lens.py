"""Diffusion Lens: pictures from the layers of a text encoder, one row for each layer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dreamreader._progress import Progress
from dreamreader.engine import Row, RunResult, plan_rows
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.localise.interventions import ablate_edits
from dreamreader.sweep.cells import Cell

if TYPE_CHECKING:
    from dreamreader.engine import Reader

_LAYER = re.compile(r"(?:.*\.)?(?:layers|block|h)\.(\d+)")
# What the two residual branches of a layer are called; without both it gives back its input.
_BRANCHES = (("self_attn", "mlp"), ("layer.0.SelfAttention", "layer.1.DenseReluDense"))
_SMALL = 12  # encoders of up to so many layers are read at each, others at every fourth


@dataclass(frozen=True, eq=False)
class Lens:
    """What a text encoder holds after some of its layers, as pictures.

    Attributes:
        layers: the layer that each row was read after; 0 are the embeddings.
        rows: prompt and seed of each row; `index` is the number of the prompt.
        result: the run.
        encoder: name of the component that was read.
    """

    layers: tuple[int, ...]
    rows: tuple[Row, ...]
    result: RunResult
    encoder: str

    @property
    def images(self) -> Any:
        """Pictures in the order of the rows: layer by layer, prompts within."""
        return self.result.images


def lens_layers(reader: "Reader", encoder: str = "text_encoder") -> list[str]:
    """Paths of the layers of a text encoder, in order.

    Raises:
        UnknownName: the pipeline has no such text encoder.
        InvalidInput: its layers are not of a known form.
    """
    known = [
        name
        for name, part in (getattr(reader.subject, "components", None) or {}).items()
        if name.startswith("text_encoder") and part is not None
    ]
    if encoder not in known:
        raise UnknownName("text encoder", encoder, known)
    numbered = {}
    for site in reader.sites(f"{encoder}.**"):
        match = _LAYER.fullmatch(site.path)
        if match is not None and site.path.count(".layer.") == 0:
            numbered[site.path] = int(match[1])
    stems = {path.rpartition(".")[0] for path in numbered}
    text = {stem for stem in stems if "vis" not in stem}  # towers for pictures have layers too
    if len(text) != 1:
        raise InvalidInput(f"{encoder}: one list of layers is expected, found {sorted(stems)}")
    return sorted((path for path in numbered if path.rpartition(".")[0] in text), key=numbered.get)  # pyright: ignore


def lens_cells(
    reader: "Reader",
    encoder: str = "text_encoder",
    layers: Sequence[int] | None = None,
    branch: str | Sequence[str] | None = "cond",
) -> list[Cell]:
    """Gives one cell for each layer l: the layers behind l hand on what they get.

    To be used with `ablate_edits(..., "zero")`. Attention and MLP of the layers behind l are
    silenced, so that the hidden state after layer l reaches the end of the encoder and takes all
    that the pipeline does there: the final norm (Stable Diffusion, T5), or none where it reads
    `hidden_states[-2]` (SDXL and the CLIP encoders of SD3: there l = L - 1 is the pipeline's own
    reading). The pooled vector comes from the same layer. In Stable Diffusion layer L - n is what
    `clip_skip=n` stands for.

    Args:
        reader: whose pipeline is meant.
        encoder: which of its text encoders is read; the others stay as they are.
        layers: 0 (embeddings) to L (the whole encoder, no sites); by default all up to 12, else
            every fourth and the last.
        branch: of the prompt; the negative prompt stays as it is.

    Raises:
        UnknownName, InvalidInput: see `lens_layers`; a layer does not exist.

    Reference:
        Toker et al. (2024), Diffusion Lens: interpreting text encoders in text-to-image pipelines.
    """
    paths = lens_layers(reader, encoder)
    depth = len(paths)
    stride = 1 if depth <= _SMALL else 4
    chosen = sorted({*range(0, depth, stride), depth}) if layers is None else list(layers)
    wrong = [each for each in chosen if not -depth - 1 <= each <= depth]
    if wrong or not chosen:
        raise InvalidInput(
            f"{encoder} has layers 0 .. {depth}, got {wrong[0] if wrong else 'no layers'}"
        )
    names = reader.sites(f"{encoder}.**").names
    cells = []
    for layer in (each % (depth + 1) for each in chosen):
        sites = [site for path in paths[layer:] for site in _residuals(path, names)]
        cells.append(Cell(f"{encoder} layer {layer}", tuple(sites), branch=branch))  # pyright: ignore
    return cells


def lens(
    reader: "Reader",
    prompts: str | Sequence[str],
    *,
    encoder: str = "text_encoder",
    layers: Sequence[int] | None = None,
    seeds: int | Sequence[int] = 0,
    branch: str | Sequence[str] | None = "cond",
    batch_size: int | None = None,
    progress: Progress = True,
    **arguments: Any,
) -> Lens:
    """Draws every prompt from the hidden state after each layer of a text encoder.

    Formula: text = norm(h_l), h_l = hidden_states[l], instead of norm(h_L); see `lens_cells`.

    Args:
        reader, encoder, layers, branch: see `lens_cells`.
        prompts, seeds: as in `Reader.run`; the rows are layers x these.
        batch_size: rows computed together; all by default.
        progress: as in `Reader.run`.
        arguments: passed on to the pipeline.

    Example:
        >>> found = lens(dreamreader.load("shapes-unet"), "a red circle", seeds=0)
        >>> found.layers
        (0, 1, 2, 3)
    """
    cells = lens_cells(reader, encoder, layers, branch)
    plan = plan_rows(prompts, seeds, ())
    of_rows = [cell for cell in cells for _ in range(len(plan))]
    result = reader.run(
        list(plan.prompts) * len(cells),
        edits=ablate_edits(of_rows, "zero"),
        seeds=list(plan.seeds) * len(cells),
        batch_size=batch_size,
        progress=progress,
        **arguments,
    )
    rows = tuple(plan.rows) * len(cells)
    numbers = [int(cell.name.rpartition(" ")[2]) for cell in cells]
    read = tuple(number for number in numbers for _ in range(len(plan)))
    return Lens(read, rows, replace(result, rows=rows), encoder)


def _residuals(path: str, names: Sequence[str]) -> list[str]:
    """The sites that add to the residual stream in a layer."""
    for tails in _BRANCHES:
        sites = [f"{path}.{tail}" for tail in tails]
        if all(site in names for site in sites):
            return sites
    expected = " or ".join(" and ".join(tails) for tails in _BRANCHES)
    raise InvalidInput(f"{path}: its attention and MLP are not known (expected {expected})")
