"""Ablation sweeps, with sets of random sites of the same sizes beside them."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from dreamreader.engine import Cache, row_means
from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job
from dreamreader.experiments.methods.base import RowTable, SweptPlaces
from dreamreader.experiments.methods.chunked import Chunked, others
from dreamreader.experiments.row import Row
from dreamreader.localise import ablate_edits
from dreamreader.recording.labelled import evenly, joined_rows
from dreamreader.specs.data import read_items
from dreamreader.specs.parts import AnySeeds, Data, Seeds, listed_seeds
from dreamreader.sweep import Cell, random_cells, records_of, site_widths


class AblateMethod(Chunked, SweptPlaces):
    """Ablates every cell of a grid.

    mean and resample draw on the prompts of `reference`, or on the unedited rows of the same batch:
    then the mean still holds what all these prompts have in common.
    """

    base: ClassVar[str] = "unedited"
    changed: ClassVar[str] = "ablated"
    control: ClassVar[str] = "random_sites"

    kind: Literal["ablate"] = "ablate"
    ablation: Literal["zero", "mean", "resample"] = "mean"
    reference: Data | None = Field(
        None, description="Prompts whose activations mean and resample draw on."
    )
    reference_seeds: AnySeeds = Field(
        default_factory=lambda: Seeds(start=200_000), description="Seeds of the reference."
    )
    floor: float | None = Field(
        None, description="Value of that column where the attribute is gone; None: differences."
    )
    random_sets: int = Field(
        3, ge=0, description="Control: sets of other sites of the same number and widths."
    )
    among: str | list[str] | None = Field(
        None, description="Globs of the sites that random sets are drawn from; `sites` by default."
    )

    def check(self, job: Job) -> None:
        self.check_cells(job, 1 + self.random_sets)
        if self.ablation == "zero" and self.reference is not None:
            raise InvalidInput("method.reference: zero draws on nothing; use mean or resample")
        alone = self.reference is None and len(job.items) * len(job.seeds) < 2
        if self.ablation == "resample" and alone:
            raise InvalidInput("method.ablation: resample needs a second row to take values from")

    def inputs(self, job: Job) -> dict[str, Any]:
        if self.reference is None:
            return {}
        prompts = [item.prompt for item in read_items(self.reference, "method.reference")]
        return {"reference": hashlib.sha256(repr(prompts).encode()).hexdigest()}

    def controls(self, job: Job) -> list[Cell]:
        """The random cells."""
        if "controls" not in job.memory:
            job.memory["controls"] = []
            if self.random_sets:
                few = {} if job.is_language else {**job.settings, "num_inference_steps": 1}
                prompt = job.items[0].prompt
                pool = self.among if self.among is not None else self.sites
                widths = site_widths(job.reader, pool, prompt, **few)
                drawn = random_cells(self.cells(job), widths, self.random_sets)
                job.memory["controls"] = [
                    replace(cell, name=f"{cell.name} (set {number})")
                    for number, each in enumerate(drawn, 1)
                    for cell in each
                ]
        return job.memory["controls"]

    def gives(self, condition: str) -> bool:
        return condition == "unedited" and self.ablation != "zero" and self.reference is None

    def read_cells(self, job: Job) -> list[Cell]:
        return [*self.cells(job), *self.controls(job)]

    def rows(self, job: Job) -> list[Row]:
        pairs = [(item, seed) for item in job.items for seed in job.seeds]
        cells, random = self.cells(job), self.controls(job)
        pieces = evenly(len(pairs), job.batch)
        among_themselves = self.ablation == "resample" and self.reference is None
        if among_themselves and min(stop - start for start, stop in pieces) < 2:
            raise InvalidInput(
                f"batch: resample takes values from another row of the same batch; {job.batch} "
                f"rows in one leave some of the {len(pairs)} alone"
            )
        table = RowTable()
        for start, stop in pieces:
            chunk = list(enumerate(pairs[start:stop]))
            for n, (item, seed) in chunk:
                table.add(item, seed, "unedited", entry=n)
            table.next_group()
            for condition, chosen in (("ablated", cells), ("random_sites", random)):
                for number, cell in enumerate(chosen):
                    axes = {"set": number // len(cells)} if condition == "random_sites" else {}
                    for n, (item, seed) in chunk:
                        table.add(item, seed, condition, cell=cell, entry=n, axes=axes)
            table.next_group()
        return table.rows

    def edits_of(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        cells = [row.cell for row in rows]
        if not any(cells):
            return []
        if self.ablation == "zero":
            return list(ablate_edits(cells, "zero"))
        own = self.reference is None
        source = self.source(job, rows[0].group - 1) if own else self._reference(job)
        if self.ablation == "mean":
            return list(ablate_edits(cells, "mean", source))
        count = len(next(iter(source.values())).rows)
        taken = others(rows, source) if own else [row.entry % count for row in rows]
        return list(ablate_edits(cells, "resample", source, taken))

    def _reference(self, job: Job) -> Cache:
        """Activations of the reference: all rows, or for mean only their mean."""
        if "reference" not in job.memory:
            assert self.reference is not None
            items = read_items(self.reference, "method.reference")
            seeds = listed_seeds(self.reference_seeds)
            rows = [(item.prompt, seed) for item in items for seed in seeds]
            with job.pause_counting():
                found = joined_rows(job.record(rows, records_of(self.read_cells(job))))
            if self.ablation == "mean":
                found = Cache([row_means(each) for each in found.values()])
            job.memory["reference"] = found
        return job.memory["reference"]
