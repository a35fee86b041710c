"""Recorded activations of one run: `Activation` per site, `Cache` over sites."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.artifacts import Artifact, pack, unpack
from dreamreader.engine import _html as html
from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.engine._pattern import join, parse
from dreamreader.engine._selection import in_steps, normalized, normalized_steps, numbers_of
from dreamreader.errors import InvalidInput, UnknownName


@dataclass(frozen=True)
class RunRow:
    """One row of a run: its number, prompt and seed, as far as they are known."""

    index: int
    prompt: str | None = None
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class Activation:
    """Values recorded at one site, with the coordinates of every axis.

    Attributes:
        tensor: [rows, steps, tokens, features]; [rows, steps, tokens, heads, d_head] at ports with
            heads; [rows, steps, tokens, heads, keys] for probabilities. With several branches a
            branch axis comes after rows.
        rows: prompt and seed of each row.
        branches: names along the branch axis; one name means that there is no such axis.
        steps: step, timestep, sigma, fraction and evaluation of each entry.
        hw: grid (height, width) of the tokens where they are places of the picture.
        tokens: which tokens of the sequence are kept, all where None.
        positions: [rows, steps, tokens] in a language model: index of each token among its row's
            own tokens, -1 where it is padding. None elsewhere: every token is one of the row.
    """

    site: str
    tensor: Float[Tensor, "rows *branch_steps_tokens features"]
    rows: tuple[RunRow, ...]
    branches: tuple[str, ...]
    steps: tuple[StepInfo, ...]
    hw: tuple[int, int] | None = None
    heads: int | None = None
    tokens: tuple[int, ...] | None = None
    positions: Tensor | None = None

    @property
    def padding(self) -> Tensor | None:
        """[rows, steps, tokens] bool: which tokens are padding; None where there is none."""
        found = None if self.positions is None else self.positions < 0
        return found if found is not None and bool(found.any()) else None

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the dimensions of `tensor`."""
        branch = ("branch",) if len(self.branches) > 1 else ()
        features = ("heads", "d_head") if self.heads else ("features",)
        if self.site.partition(":")[2].startswith("probs"):
            features = ("heads", "keys")
        return ("rows", *branch, "steps", "tokens", *features)

    @property
    def grid(self) -> Tensor:
        """The tensor with its tokens as [height, width].

        Raises:
            InvalidInput: the tokens are not a full grid.
        """
        if self.hw is None or self.tokens is not None:
            raise InvalidInput(f"{self.site}: the recorded tokens are no grid of the picture")
        return self.tensor.unflatten(self.axes.index("tokens"), self.hw)

    def to(self, *args: Any, **kwargs: Any) -> "Activation":
        """Like `Tensor.to`, for the stored values."""
        return replace(self, tensor=self.tensor.to(*args, **kwargs))

    def select(
        self, *, step: Any = None, branch: Any = None, rows: Any = None, tokens: Any = None
    ) -> "Activation":
        """Part of the activation by its coordinates; every axis stays, also with one entry.

        Args:
            step: index of a denoising step, or slice, range, set or predicate of it.
            branch: one name or several.
            rows: indices, slice or mask, as in `Request`.
            tokens: the same, over the recorded tokens as they stand, padding included.

        Raises:
            UnknownName: there is no such branch.
            InvalidInput: nothing is left, or an index is out of range.
        """
        found = self
        if branch is not None:
            found = found._of_branches((branch,) if isinstance(branch, str) else tuple(branch))
        if step is not None:
            if all(each.step < 0 for each in self.steps):
                raise InvalidInput(f"{self.site}: its values are of no known step; leave step out")
            total = max(each.step for each in self.steps) + 1
            chosen = normalized_steps(step, f"{self.site}: step")
            kept = [n for n, each in enumerate(found.steps) if in_steps(chosen, each.step, total)]
            if not kept:
                had = ", ".join(str(each.step) for each in self.steps)
                raise InvalidInput(f"{self.site}: no step matches {step!r}; recorded are {had}")
            positions = found._positions_at(1, kept)
            steps = tuple(found.steps[n] for n in kept)
            found = found._select("steps", kept, steps=steps, positions=positions)
        if rows is not None:
            kept = _numbers(rows, len(found.rows), f"{self.site}: rows")
            positions = found._positions_at(0, kept)
            named = tuple(found.rows[n] for n in kept)
            found = found._select("rows", kept, rows=named, positions=positions)
        if tokens is not None:
            count = found.tensor.shape[found.axes.index("tokens")]
            chosen = normalized(tokens, f"{self.site}: tokens")
            if isinstance(chosen, Tensor) and chosen.shape == found.hw and found.tokens is None:
                chosen = chosen.flatten()  # a mask of the picture
            kept = numbers_of(chosen, count, f"{self.site}: tokens")
            places = found.tokens or tuple(range(count))
            positions = found._positions_at(2, kept)
            named = tuple(places[n] for n in kept)
            found = found._select("tokens", kept, tokens=named, positions=positions)
        return found

    def _of_branches(self, names: tuple[str, ...]) -> "Activation":
        for name in names:
            if name not in self.branches:
                raise UnknownName("branch", name, self.branches, f"Recorded at {self.site}")
        if names == self.branches:
            return self
        kept = [self.branches.index(name) for name in names]
        tensor = self.tensor.index_select(1, torch.tensor(kept, device=self.tensor.device))
        return replace(
            self, tensor=tensor.squeeze(1) if len(names) == 1 else tensor, branches=names
        )

    def _positions_at(self, axis: int, kept: list[int]) -> Tensor | None:
        if self.positions is None:
            return None
        return self.positions.index_select(axis, torch.tensor(kept))

    def _select(self, axis: str, kept: list[int], **coordinates: Any) -> "Activation":
        index = torch.tensor(kept, device=self.tensor.device)
        tensor = self.tensor.index_select(self.axes.index(axis), index)
        return replace(self, tensor=tensor, **coordinates)

    def _check(self) -> None:
        """Refuses coordinates that are not those of the tensor.

        Raises:
            InvalidInput: a length differs; names the axis.
        """
        sizes = {"rows": len(self.rows), "branch": len(self.branches), "steps": len(self.steps)}
        sizes |= {"heads": self.heads} if self.heads else {}
        sizes |= {"tokens": len(self.tokens)} if self.tokens is not None else {}
        axes, shape = self.axes, self.tensor.shape
        off = {n: s for n, s in zip(axes, shape, strict=False) if sizes.get(n, s) != s}
        if len(axes) != len(shape) or off:
            raise InvalidInput(
                f"{self.site}: a tensor {list(shape)} has not the axes {', '.join(axes)} with "
                f"{', '.join(f'{size} {name}' for name, size in sizes.items())}"
            )

    def _summary(self) -> list[tuple[str, str]]:
        steps = [each.step for each in self.steps if each.step >= 0]
        return [
            ("site", self.site),
            ("shape", _shape(self)),
            ("dtype", f"{str(self.tensor.dtype).removeprefix('torch.')} on {self.tensor.device}"),
            ("branches", ", ".join(self.branches)),
            ("steps", f"{steps[0]} .. {steps[-1]} ({len(steps)})" if steps else "none"),
            ("grid", "x".join(map(str, self.hw)) if self.hw else ""),
            ("padding", self._padding_summary()),
        ]

    def _padding_summary(self) -> str:
        padding = self.padding
        if padding is None:
            return ""
        return f"{int(padding.sum())} of {padding.numel()} tokens (see positions)"

    def __repr__(self) -> str:
        shown = "; ".join(f"{key} {value}" for key, value in self._summary()[1:] if value)
        return f"Activation({self.site}: {shown})"

    def _repr_html_(self) -> str:
        return html.table(("", ""), self._summary())


class Cache(Mapping[str, Activation], Artifact, kind="cache"):
    """Activations by site name. A key may be a glob that matches one recorded site.

    Example:
        >>> cache = Cache([])
        >>> len(cache)
        0
    """

    def __init__(self, activations: Sequence[Activation] = ()):
        self._found = {each.site: each for each in activations}

    def __getitem__(self, site: str) -> Activation:
        if site in self._found:
            return self._found[site]
        pattern = parse(site)
        hits = [
            name
            for name in self._found
            if (other := parse(name)).port == pattern.port
            and other.stream == pattern.stream
            and pattern.matches(other.path)
        ]
        if len(hits) == 1:
            return self._found[hits[0]]
        if hits:
            raise InvalidInput(
                f"{site!r} matches {len(hits)} recorded sites ({', '.join(hits[:3])} ...): name "
                "one, or use matching()"
            )
        canonical = join(pattern.path, pattern.port, pattern.stream)
        if canonical in self._found:
            return self._found[canonical]
        raise UnknownName("recorded site", site, self._found)

    def __contains__(self, site: object) -> bool:
        return site in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def get(self, site: str, default: Any = None) -> Any:
        """The activation of a site, or the default where it was not recorded."""
        return self._found.get(site, default)

    def _fill(self, activations: Sequence[Activation]) -> None:
        self._found.update({each.site: each for each in activations})

    def matching(self, pattern: str) -> "Cache":
        """The part of the cache whose sites match a glob of paths (any port if none is given)."""
        wanted = parse(pattern)
        named = ":" in pattern
        return Cache(
            [
                each
                for name, each in self._found.items()
                if wanted.matches(parse(name).path)
                and (not named or parse(name).port == wanted.port)
            ]
        )

    def to(self, *args: Any, **kwargs: Any) -> "Cache":
        """Like `Tensor.to`, for every activation."""
        return Cache([each.to(*args, **kwargs) for each in self._found.values()])

    def select(self, **coordinates: Any) -> "Cache":
        """`Activation.select` on every activation."""
        return Cache([each.select(**coordinates) for each in self._found.values()])

    @property
    def sites(self) -> tuple[str, ...]:
        """The recorded sites."""
        return tuple(self._found)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        return tensors, {"activations": pack(list(self.values()), tensors, _SAVED)}

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Self:
        found = unpack(content["activations"], tensors, _SAVED)
        for each in found:
            each._check()
        return cls(found)

    @property
    def nbytes(self) -> int:
        return sum(each.tensor.nbytes for each in self._found.values())

    def _table(self) -> list[tuple[str, ...]]:
        return [
            (
                name,
                _shape(each),
                str(each.tensor.dtype).removeprefix("torch."),
                ", ".join(each.branches),
            )
            for name, each in self._found.items()
        ]

    def _caption(self) -> str:
        return f"Cache of {len(self)} sites, {self.nbytes / 2**20:.1f} MiB"

    def __repr__(self) -> str:
        return f"{self._caption()}\n" + html.text_table(_HEADER, self._table())

    def _repr_html_(self) -> str:
        return html.table(_HEADER, self._table(), self._caption())


_SAVED = {"Activation": Activation, "Instant": StepInfo, "Row": RunRow}  # names in files
_HEADER = ("site", "shape", "dtype", "branches")


def _shape(activation: Activation) -> str:
    sizes = zip(activation.axes, activation.tensor.shape, strict=True)
    return "[" + ", ".join(f"{name} {size}" for name, size in sizes) + "]"


def _numbers(chosen: Any, count: int, label: str) -> list[int]:
    return numbers_of(normalized(chosen, label), count, label)
