"""Directions: one vector for each site and step, with what speaks for them."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.artifacts import Artifact
from dreamreader.edits import Ablate, Steer
from dreamreader.engine import same
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.steering.evidence import Evidence


@dataclass(frozen=True, eq=False)
class Directions(Mapping[str, Tensor], Artifact, kind="directions"):
    """Directions by site, as `Steer` takes them.

    Attributes:
        vectors: [steps, features] by site, one for each step of the run, or [features] for all
            steps. Steps that were not recorded have zeros, so nothing is added there.
        source, target: labels; adding a direction leads from the source to the target.
        method: `mean`, `caa`, `pca`, `lda` or `logistic`.
        norm: what was scaled to length 1: `channel` each vector over its features, `tensor` the
            vector repeated at each recorded token, over tokens and features; or `none`.
        evidence: by site, see `Evidence`.

    Example:
        >>> directions = Directions({"0": torch.ones(4)}, "red", "blue", "mean", "none")
        >>> directions.steer(alpha=[0.0, 2.0]).row_lengths()
        {'alpha': 2}
    """

    vectors: Mapping[str, Float[Tensor, "*steps features"]]
    source: str
    target: str
    method: str
    norm: str
    evidence: Mapping[str, Evidence] = field(default_factory=dict)

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.vectors:
            raise UnknownName("site of directions", site, self.vectors)
        return self.vectors[site]

    def __contains__(self, site: object) -> bool:
        return site in self.vectors

    def __iter__(self) -> Iterator[str]:
        return iter(self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Directions):
            return NotImplemented
        names = (*_NAMES, "vectors", "evidence")
        return all(same(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        lines = [f"Directions({self.source} -> {self.target}, {self.method}, norm {self.norm})"]
        for site, found in self.evidence.items():
            aucs = [each for each in found.auc if each == each]
            shown = f"AUC {min(aucs):.2f} .. {max(aucs):.2f}" if aucs else "AUC unknown"
            lines.append(f"  {site} {list(self.vectors[site].shape)}: {shown}")
        return "\n".join(lines)

    def only(self, *sites: str) -> "Directions":
        """The directions of some sites.

        Raises:
            UnknownName: there is none for a site.
        """
        vectors = {site: self[site] for site in sites}
        evidence = {site: self.evidence[site] for site in sites if site in self.evidence}
        return Directions(vectors, self.source, self.target, self.method, self.norm, evidence)

    def steer(self, alpha: Any = 1.0, **selection: Any) -> Steer:
        """The edit x + alpha v at all sites.

        Args:
            alpha: one number or one for each row.
            selection: `steps`, `branch`, `tokens`, `rows`, `norm_match`, `gate`, as in `Steer`.
        """
        return Steer(list(self), self.vectors, alpha=alpha, **selection)

    def remove(self, strength: Any = 1.0, **selection: Any) -> Ablate:
        """The edit x - strength max(<x, v>, 0) v at all sites, v scaled to length 1.

        Args:
            strength: one number or one for each row; 2 mirrors what points along v.
            selection: `one_sided=False` removes both signs, `norm_match=True` keeps each token's
                norm; `steps`, `branch`, `tokens`, `rows` as in `Ablate`.
        """
        selection.setdefault("one_sided", True)
        per_step = any(vector.dim() == 2 for vector in self.vectors.values())
        selection |= {"per_step": per_step, "strength": strength}
        return Ablate(list(self), "project", direction=self.vectors, **selection)

    def random(self, seed: int) -> "Directions":
        """Random directions of the same norms at the same sites: the control of what these do."""
        vectors = {
            site: random_like(vector, seed + number)
            for number, (site, vector) in enumerate(self.vectors.items())
        }
        return Directions(vectors, self.source, self.target, "random", self.norm)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that have a direction."""
        return tuple(self.vectors)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One tensor for each site, named by the site, so that any reader finds the vectors."""
        content = {
            **{name: getattr(self, name) for name in _NAMES},
            "evidence": {site: _plain(each) for site, each in self.evidence.items()},
            "sites": list(self),
        }
        return dict(self.vectors), content

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> "Directions":
        vectors = {site: tensors[site] for site in content["sites"]}
        for site, each in vectors.items():
            if each.dim() not in (1, 2):
                raise InvalidInput(
                    f"{site}: [features] or [steps, features] is needed, got {list(each.shape)}"
                )
        names = (str(content[each]) for each in _NAMES)
        evidence = {site: _evidence(each) for site, each in content["evidence"].items()}
        return cls(vectors, *names, evidence=evidence)


_NAMES = ("source", "target", "method", "norm")


def save(path: str | os.PathLike[str], directions: Directions) -> None:
    """Writes directions to a file, see `Directions.save`."""
    directions.save(path)


def load(path: str | os.PathLike[str]) -> Directions:
    """The directions of a file, see `Directions.load`."""
    return Directions.load(path)


def _plain(evidence: Evidence) -> dict[str, Any]:
    """Numbers as JSON has them, null for NaN."""

    def value(each: float) -> float | None:
        return None if each != each else each

    return {name: [value(each) for each in found] for name, found in asdict(evidence).items()}


def _evidence(content: Mapping[str, Any]) -> Evidence:
    values: dict[str, Any] = {
        each.name: tuple(float("nan") if value is None else value for value in content[each.name])
        for each in fields(Evidence)
    }
    return Evidence(**values)


def random_like(
    direction: Float[Tensor, "*steps features"], seed: int
) -> Float[Tensor, "*steps features"]:
    """A random direction of the same norm: the control of every steering result.

    With one direction per step, the random unit vector is the same at all steps and only its norm
    follows: independent draws per step would partly cancel and make a weaker control.

    Args:
        direction: the direction to match.
        seed: of the draw, on the CPU.

    Returns:
        A new tensor of the same shape, dtype and, row by row, norm.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(direction.shape[-1], generator=generator, dtype=torch.float64)
    norm = direction.double().norm(dim=-1, keepdim=True)
    return (draw / draw.norm() * norm.cpu()).to(direction)
