"""Diffusion Lens: pictures from the layers of a text encoder."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from dreamreader.experiments.job import Job, Method
from dreamreader.experiments.methods.base import RowTable, check_size
from dreamreader.experiments.row import Row
from dreamreader.localise import ablate_edits, lens_cells
from dreamreader.sweep import Cell


class LensMethod(Method):
    """Draws every prompt from what the text encoder holds after each of its layers."""

    kind: Literal["lens"] = "lens"
    encoder: str = "text_encoder"
    layers: list[int] | None = Field(
        None, description="Layers, 0 for the embeddings; by default all up to 12, else every 4th."
    )

    def cells(self, job: Job) -> list[Cell]:
        return lens_cells(job.reader, self.encoder, self.layers)

    def check(self, job: Job) -> None:
        layers = len(self.cells(job))
        check_size(layers=layers, prompts=len(job.items), seeds=len(job.seeds))

    def rows(self, job: Job) -> list[Row]:
        cells = self.cells(job)
        table = RowTable()
        for item in job.items:
            for seed in job.seeds:
                table.add(item, seed, "unedited")
        for cell in cells:
            for item in job.items:
                for seed in job.seeds:
                    layer = int(cell.name.rsplit(" ", 1)[-1])
                    table.add(item, seed, "lens", cell=cell, axes={"layer": layer})
        return table.rows

    def edits_of(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        cells = [row.cell for row in rows]
        return list(ablate_edits(cells, "zero")) if any(c and c.sites for c in cells) else []
