"""Latents of autoencoders in transfers: chosen in each model, carried with their autoencoder."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dreamreader.edits import Steer
from dreamreader.engine import EditRequest
from dreamreader.errors import InvalidInput
from dreamreader.experiments.folder import RunFolder
from dreamreader.experiments.job import Job
from dreamreader.experiments.methods.sae import AutoencoderFile, SaeMethod
from dreamreader.experiments.methods.sae_choice import FeatureSet, LatentChoice
from dreamreader.experiments.methods.transfer_base import Carried
from dreamreader.experiments.methods.transfer_fits import affine_maps, difference_directions
from dreamreader.jobs.folder import FINGERPRINT
from dreamreader.mapping import PairedRows
from dreamreader.sae import SAEEdit, SparseAutoencoder, fold, map_sae
from dreamreader.specs.parts import Part
from dreamreader.steering import Directions, random_like
from dreamreader.sweep import site_widths

LATENT_ROWS = 20_000  # of the pairs, by which an autoencoder is checked

Edits = Callable[..., Sequence[EditRequest]]
"""Takes a strength for each row, sites, and a selection."""


class CarriedLatents(Part):
    """Latents that are carried, and those of the subject that they are compared with.

    A strength is what codes are set to, or with `choose` a multiple of the mean code of the label.
    """

    autoencoder: AutoencoderFile = Field(description="Of the source.")
    features: list[int] | None = Field(
        None, min_length=1, description="Its latents, which are set together; or choose finds them."
    )
    native: AutoencoderFile | None = Field(
        None, description="Of the subject; without one a difference of means is native."
    )
    native_features: list[int] | None = Field(
        None, min_length=1, description="Latents of native; or choose finds them."
    )
    choose: LatentChoice | None = Field(
        None, description="How latents are found, in each model by what they do to its pictures."
    )
    use: Literal["autoencoder", "direction"] = Field(
        "autoencoder",
        description="Set codes of the mapped autoencoder; or add the mapped decoder rows.",
    )

    @model_validator(mode="after")
    def _one_set(self) -> "CarriedLatents":
        if self.native is None and self.native_features is not None:
            raise ValueError("native_features: are of native; give its file")
        open_sets = [self.features] + ([self.native_features] if self.native else [])
        if self.choose is None:
            if None in open_sets:
                raise ValueError("give features (and native_features beside native), or choose")
            return self
        if None not in open_sets:
            raise ValueError("choose: all latents are named already; leave it out")
        if len(self.choose.targets or ()) != 1 or len(self.choose.sizes) != 1:
            raise ValueError(
                "choose: one set is carried; give one label and one size, such as targets: [green] "
                "and sizes: [1]"
            )
        if self.choose.goal != "add":
            raise ValueError("choose.goal: what is carried is turned on; take add")
        if self.choose.where is not None and self.use == "direction":
            raise ValueError(
                "choose.where: a direction is added at all tokens; leave it out, or take use: "
                "autoencoder"
            )
        return self

    @property
    def sides(self) -> list[tuple[str, AutoencoderFile, list[int] | None]]:
        """The field of each autoencoder, its file and the latents that are named."""
        found = [("autoencoder", self.autoencoder, self.features)]
        if self.native is not None:
            found.append(("native", self.native, self.native_features))
        return found


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents with the autoencoder that they are of."""

    sae: SparseAutoencoder
    features: FeatureSet

    def direction(self) -> Tensor:
        """What they add at strength 1, [d_in]."""
        chosen = list(self.features.features)
        levels = torch.tensor(self.features.levels or [1.0] * len(chosen))
        return (levels @ fold(self.sae).W_dec.detach()[chosen]).cpu()

    def edits(
        self, alpha: Sequence[float], sites: Sequence[str], **selection: Any
    ) -> list[EditRequest]:
        """Sets the codes of each row to its strength; rows of strength 0 stay as they are."""
        own = self.features
        return [
            SAEEdit(
                sites,
                self.sae,
                own.features,
                "set",
                own.values(strength),
                [float(each == strength) for each in alpha],
                where=own.where,
                **selection,
            )
            for strength in dict.fromkeys(alpha)
            if strength
        ]

    def random(self) -> "Latents":
        """The same codes, with random decoder rows of the same norms."""
        made = copy.deepcopy(self.sae)
        with torch.no_grad():
            for number in self.features.features:
                made.W_dec[number] = random_like(self.sae.W_dec[number], seed=number)
        return Latents(made, self.features)


def check_latents(method: Carried, own: CarriedLatents, job: Job) -> None:
    """Refuse autoencoders that the sites do not fit, and latents that they do not have."""
    partner = method.partners(job)
    if len(partner) != 1 or len(method.cells(job)) != 1:
        raise InvalidInput(
            f"method.sites: an autoencoder is of one site, got {len(partner)} in "
            f"{len(method.cells(job))} cells; write a spec for each"
        )
    if own.choose is not None:
        if job.is_language:
            raise InvalidInput(
                "method.feature.choose: latents are chosen by pictures, which a language model "
                "lacks; give features"
            )
        own.choose.labels()
        own.choose.items("trial")
    ((site, theirs),) = partner.items()
    places = {"autoencoder": (method.source_job(job), theirs), "native": (job, site)}
    for field, file, named in own.sides:
        at, place = places[field]
        few = {} if at.is_language else {**at.settings, "num_inference_steps": 1}
        ((name, width),) = site_widths(at.reader, place, job.items[0].prompt, **few).items()
        sae = file.loaded
        if sae.d_in != width:
            raise InvalidInput(
                f"method.feature.{field}: {file.file} has d_in={sae.d_in}, {name} of "
                f"{at.spec.subject.model} has {width} features; give one that was trained there"
            )
        for each in named or ():
            if not 0 <= each < sae.d_sae:
                name = "features" if field == "autoencoder" else "native_features"
                raise InvalidInput(
                    f"method.feature.{name}: latent {each} is none of {sae.d_sae}; they are "
                    f"numbered from 0 to {sae.d_sae - 1}"
                )


def check_explained(own: CarriedLatents, rows: PairedRows) -> None:
    """Refuse an autoencoder of another site of this width: it explains nothing of the rows here."""
    found = rows.flat()
    for (field, file, _), x in zip(own.sides, found[:2], strict=False):
        fvu = _unexplained(file.loaded, x[:: max(1, len(x) // LATENT_ROWS)])
        if not fvu < 1:
            raise InvalidInput(
                f"method.feature.{field}: {file.file} explains nothing of the activations here "
                f"(fraction of variance unexplained {fvu:.2f}, 1 is that of their mean); it is of "
                "another site, model or branch"
            )


def latent_inputs(own: CarriedLatents) -> dict[str, Any]:
    """What the numbers depend on beside the spec: weights of autoencoders, and chosen prompts."""
    found: dict[str, Any] = {field: dict(file.loaded.state_dict()) for field, file, _ in own.sides}
    if own.choose is not None:
        found["choose"] = own.choose.digest()
    return found


def latent_directions(
    method: Carried, own: CarriedLatents, job: Job
) -> tuple[Directions, Directions]:
    """What latents of the subject and of the source add, as directions."""
    ((site, theirs),) = method.partners(job).items()
    carried = _choose(method, own, "autoencoder", job)
    label = own.choose.labels()[0] if own.choose is not None else "latents"
    if own.native is None:
        native = difference_directions(method, job, [site])
    else:
        vector = _choose(method, own, "native", job).direction()
        native = Directions({site: vector}, "none", label, "mean", "none")
    return native, Directions({theirs: carried.direction()}, "none", label, "mean", "none")


def carried_latents(method: Carried, own: CarriedLatents, job: Job) -> dict[str, Edits]:
    """Edits of the subject's own latents and of those of the source, their autoencoder mapped.

    Returns:
        By `native`, `random_direction` (its decoder rows random), the names of maps, and
        `unmapped`.
    """
    maps = affine_maps(method, job)
    ((site, _),) = method.partners(job).items()
    carried = _choose(method, own, "autoencoder", job)
    if own.native is None:
        plain = difference_directions(method, job, [site])
        found: dict[str, Edits] = {
            "native": _steer(plain),
            "random_direction": _steer(plain.random(seed=1)),
        }
    else:
        native = _choose(method, own, "native", job)
        found = {"native": native.edits, "random_direction": native.random().edits}
    for name, each in maps.items():
        found[name] = Latents(map_sae(carried.sae, *each[site]), carried.features).edits
    return found


def _steer(directions: Directions) -> Edits:
    def edits(alpha: Sequence[float], sites: Sequence[str], **selection: Any) -> list[EditRequest]:
        return [Steer(sites, directions.only(*sites).vectors, alpha, **selection)]

    return edits


def _choose(method: Carried, own: CarriedLatents, field: str, job: Job) -> Latents:
    """The latents that a side names, or those that change its pictures most."""
    ((site, theirs),) = method.partners(job).items()
    file, named = next((file, named) for name, file, named in own.sides if name == field)
    if named is not None:
        return Latents(file.loaded, FeatureSet(tuple(named)))
    assert job.folder is not None and own.choose is not None
    in_source = field == "autoencoder"
    folder = RunFolder(job.folder.path / "artifacts" / ("source" if in_source else "native"))
    if folder.fingerprint() is None:
        folder.write(FINGERPRINT, job.folder.need_fingerprint())
    side = method.source_job(job) if in_source else job
    alone = replace(side, memory={}, metrics=job.metrics, folder=folder)
    chooser = SaeMethod.model_validate(
        {
            "autoencoder": file,
            "sites": theirs if in_source else site,
            "branch": method.branch,
            "tokens": method.tokens,
            "choose": own.choose,
            "op": "set" if own.use == "autoencoder" else "add",
            "strengths": getattr(method, "strengths", [1.0]),
            "controls": [],
        }
    )
    with job.pause_counting():
        chooser.prepare(alone)
    ((_, features),) = alone.memory["sets"].items()
    return Latents(file.loaded, features)


@torch.no_grad()
def _unexplained(sae: SparseAutoencoder, x: Tensor) -> float:
    x = x.to(sae.W_dec.device, sae.W_dec.dtype)
    return float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
