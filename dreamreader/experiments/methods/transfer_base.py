"""Where a transfer takes what it carries from, and the maps that carry it."""

from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments.job import Job, Method
from dreamreader.experiments.methods.base import SweptPlaces, Tokens
from dreamreader.experiments.methods.stitch_maps import AnyMap, MapSpec
from dreamreader.mapping import PairedRows
from dreamreader.mapping.stitch import only_site
from dreamreader.specs.parts import AnySeeds, AnySubject, Count, Data, Seeds
from dreamreader.specs.subject import open_subject, with_padding
from dreamreader.training.parts import Training


class Carried(Method, SweptPlaces):
    """Base of methods that carry something from a source model to the subject."""

    source: AnySubject = Field(description="The model that it comes from.")
    source_sites: dict[str, str] = Field(
        default_factory=dict,
        description="Site of the source for each site of the subject; of the same name by default.",
    )
    maps: list[AnyMap] = Field(
        default_factory=lambda: [MapSpec(method="ridge", name=None)],
        min_length=1,
        description="Maps, methods of `dreamreader.mapping.fit_map` or mappings with options.",
    )
    map_data: Data = Field(description="Prompts that the maps are fitted to.")
    map_seeds: AnySeeds = Field(
        default_factory=lambda: Seeds(start=300_000), description="Seeds of these prompts."
    )
    trajectory: Literal["own", "source", "target"] = Field(
        "own", description="Latents of the pairs of the maps: own, or those of one for both."
    )
    align: Literal["index", "spans"] | None = Field(
        None,
        description="Tokens of the pairs of the maps: of one number, or pieces of the text that "
        "both language models cut, which are their default.",
    )
    skip: int = Field(
        0, ge=0, description="First pairs of tokens of each text that maps are not fitted to."
    )
    fit: Data | None = Field(
        None, description="Pairs that directions are fitted from, in both models."
    )
    fit_seeds: AnySeeds = Field(
        default_factory=lambda: Seeds(start=100_000), description="Seeds of the pairs."
    )
    fit_tokens: Tokens = Field(
        None, description="Tokens of prompts to fit at, such as -1; by default those of tokens."
    )
    direction: Literal["mean", "caa", "pca", "lda", "logistic"] = "mean"
    per_step: bool = Field(True, description="A direction for every step, or one for all.")
    rank: Count = Field(4, description="Of learned edits.")
    training: Training = Field(default_factory=Training, description="Of learned edits.")

    @property
    def named_maps(self) -> dict[str, MapSpec]:
        """The maps by their names in tables."""
        return {each.label: each for each in self.maps}

    @property
    def has_unmapped(self) -> bool:
        """Whether what was not mapped is a control."""
        return False

    @property
    def has_edits(self) -> bool:
        """Whether learned edits are carried, no directions."""
        return False

    def check_rows(self, rows: PairedRows) -> None:
        """Refuse what does not fit the paired rows of a site, before maps are fitted to them."""

    @cached_property
    def source_reader(self) -> Reader:
        """Of the source, opened once."""
        return with_padding(open_subject(self.source))

    def directions_file(self, folder: Path, name: str) -> Path:
        """Of `native`, `unmapped` or the name of a map."""
        return folder / "artifacts" / f"directions-{in_file(name)}.safetensors"

    def map_file(self, folder: Path, name: str, site: str, way: str = "map") -> Path:
        """The map of a name to a site, with its scores on held-out prompts on its card.

        Args:
            way: `map`, or `back` for the one from the subject to the source.
        """
        return folder / "artifacts" / f"{way}-{in_file(name)}-{site}.safetensors"

    def source_job(self, job: Job) -> Job:
        """The same call on the source."""
        if "source" not in job.memory:
            spec = job.spec.model_copy(update={"subject": self.source})
            job.memory["source"] = Job(
                spec, self.source_reader, job.items, [], job.folder, job.batch
            )
        return job.memory["source"]

    def partners(self, job: Job) -> dict[str, str]:
        """For each site of the cells that of the source, by their full names.

        Raises:
            InvalidInput: the source has no such site, or several.
        """
        sites = dict.fromkeys(site for cell in self.cells(job) for site in cell.sites)
        found = {}
        for site in sites:
            theirs = self.source_sites.get(site, site)
            try:
                found[site] = only_site(self.source_reader, theirs)
            except (InvalidInput, UnknownName) as error:
                raise InvalidInput(
                    f"method.source_sites: the site that belongs to {site}, in "
                    f"{self.source.model}: {error}"
                ) from error
        return found


def in_file(name: str) -> str:
    """The name of a map as files of the run folder have it."""
    return name.replace(" ", "-")
