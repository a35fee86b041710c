"""Paired rows of one source and one target site, with all that maps ask of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.mapping.checks import as_tensor, check_number, check_rows, check_whole
from dreamreader.mapping.moments import CrossMoments

if TYPE_CHECKING:
    from collections.abc import Callable

    from dreamreader.recording import Pairs

WEIGHTS = ("tokens", "rows")


@dataclass(frozen=True, eq=False)
class PairedRows:
    """What belongs together at a site of a source and a site of a target, in sequences of tokens.

    A sequence is what was recorded at once: the tokens of one row at one call.

    Attributes:
        x, y: [sequences, tokens, features] of source and target, tensors on any device (without
            their graph) or NumPy arrays, of any floating point type; [rows, features] are
            sequences of one token.
        weights: of the tokens, 0 where there is none (padding); 1 each where None.
        groups: number of what sequences have in common, such as their prompt, by which they are
            held out together; each its own by default.
        steps: of the target's scheduler at each sequence. levels: ratio of noise to signal there.
        source_site, target_site: names.

    Raises:
        InvalidInput: shapes do not fit.

    Example:
        >>> rows = PairedRows(torch.randn(10, 3), torch.randn(10, 5))
        >>> train, held_out = rows.split(0.2)
        >>> len(train), len(held_out), train.d_source
        (8, 2, 3)
    """

    x: Float[Tensor, "sequences *tokens d_source"]
    y: Float[Tensor, "sequences *tokens d_target"]
    weights: Float[Tensor, "sequences tokens"] | None = None
    groups: Int[Tensor, " sequences"] | None = None
    steps: Int[Tensor, " sequences"] | None = None
    levels: Float[Tensor, " sequences"] | None = None
    source_site: str | None = None
    target_site: str | None = None

    def __post_init__(self):
        for name in ("x", "y"):
            value = check_rows(f"pairs: {name}", getattr(self, name))
            if value.dim() not in (2, 3):
                raise InvalidInput(
                    f"pairs: {name} must be [rows, features] or [sequences, tokens, features], got "
                    f"{list(value.shape)}"
                )
            object.__setattr__(self, name, value if value.dim() == 3 else value.unsqueeze(1))
        if self.x.shape[:2] != self.y.shape[:2]:
            raise InvalidInput(
                f"pairs: as many rows and tokens on both sides are needed, got source "
                f"{list(self.x.shape)} and target {list(self.y.shape)}"
            )
        shape = list(self.x.shape[:2])
        for name in ("groups", "steps", "levels", "weights"):
            if getattr(self, name) is None:
                continue
            value = as_tensor(f"pairs: {name}", getattr(self, name))
            wanted = shape if name == "weights" else shape[:1]
            if list(value.shape) != wanted:
                raise InvalidInput(f"pairs: {name} must be {wanted}, got {list(value.shape)}")
            if name in ("groups", "steps") and (
                value.is_floating_point() or value.dtype.is_complex
            ):
                raise InvalidInput(f"pairs: {name} are whole numbers, got {value.dtype}")
            if name in ("levels", "weights") and not bool((value >= 0).all()):
                raise InvalidInput(f"pairs: {name} are numbers from 0, some are not")
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        pairs: "Pairs",
        source: str,
        target: str,
        *,
        weigh: str = "tokens",
        levels: Sequence[float] | None = None,
        resample: str = "area",
    ) -> "PairedRows":
        """The rows of one site of each side.

        Args:
            pairs: as `record_between` gives them.
            source, target: sites.
            weigh: `tokens`: each token counts the same; `rows`: each row does, however many tokens
                it has. Padding never counts.
            levels: ratio of noise to signal at each call of the target; by default those that the
                pairs have.
            resample: how the source comes to the grid of the target where theirs differ; see
                `recording.resample_grid`.

        Raises:
            UnknownName: a side has no such site.
            InvalidInput: the sites have other numbers of tokens, or levels are not as many.
        """
        if weigh not in WEIGHTS:
            raise UnknownName("weighting of pairs", str(weigh), WEIGHTS)
        if not hasattr(pairs, "values_at"):
            raise InvalidInput(
                f"PairedRows.of: what record_between gives is needed, got {type(pairs).__name__}; "
                "PairedRows(x, y) takes tensors"
            )
        x, y = pairs.values_at(source, target, resample)
        rows, calls = pairs.rows, pairs.calls
        levels = pairs.levels if levels is None else levels
        if levels is not None and len(levels) != calls:
            raise InvalidInput(f"pairs: {calls} calls, but {len(levels)} noise levels")
        steps = pairs.steps if pairs.times is None else [each.step for each in pairs.times[1]]
        weights = None
        if pairs.counts is not None:
            weights = pairs.token_weights(source, torch.arange(rows))
            weights = (weights > 0).double() if weigh == "tokens" else weights
        elif weigh == "rows":
            weights = torch.full((rows, y.shape[2]), 1 / y.shape[2], dtype=torch.float64)
        weights = None if weights is None else weights.repeat_interleave(calls, 0)
        groups = torch.arange(rows) if pairs.groups is None else pairs.groups
        each_row = {
            name: None if values is None else torch.tensor(list(values)).repeat(rows)
            for name, values in (("steps", steps), ("levels", levels))
        }
        return cls(
            x.flatten(0, 1),
            y.flatten(0, 1),
            weights,
            groups.repeat_interleave(calls),
            source_site=source,
            target_site=target,
            **each_row,
        )

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.x)

    @property
    def d_source(self) -> int:
        return self.x.shape[2]

    @property
    def d_target(self) -> int:
        return self.y.shape[2]

    @property
    def tokens(self) -> int:
        """Places of a sequence."""
        return self.x.shape[1]

    def select(self, index: Tensor | slice) -> "PairedRows":
        """Some sequences, by number, by True and False, or as a view by a slice.

        Raises:
            InvalidInput: the index is neither a slice nor a list, or names none of the sequences.
        """
        if not isinstance(index, slice):
            index = as_tensor("pairs: an index", index)
            if index.dim() != 1:
                raise InvalidInput(
                    f"pairs: sequences are chosen by a slice or a list, got {list(index.shape)}"
                )
            self._check_index(index)
        fields = ("x", "y", "weights", "groups", "steps", "levels")
        values = {name: getattr(self, name) for name in fields}
        return replace(
            self, **{name: None if each is None else each[index] for name, each in values.items()}
        )

    def _check_index(self, index: Tensor) -> None:
        """Refuse numbers of sequences that there are not, and masks of another length."""
        count = len(self)
        if index.dtype == torch.bool:
            if len(index) != count:
                raise InvalidInput(f"pairs: the mask has {len(index)} values for {count} sequences")
        elif index.is_floating_point() or index.dtype.is_complex:
            raise InvalidInput(f"pairs: sequences are chosen by whole numbers, got {index.dtype}")
        elif len(index) and not -count <= int(index.min()) <= int(index.max()) < count:
            wrong = int(index.max()) if int(index.max()) >= count else int(index.min())
            raise InvalidInput(f"pairs: sequence {wrong} asked for, there are {count}")

    def reversed(self) -> "PairedRows":
        """The same pairs from the target's side: for a map back."""
        return replace(
            self,
            x=self.y,
            y=self.x,
            source_site=self.target_site,
            target_site=self.source_site,
        )

    def split(self, share: float = 0.2, seed: int = 0) -> "tuple[PairedRows, PairedRows]":
        """To fit, and held out: groups are drawn whole. Both are copies.

        Args:
            share: of the groups that is held out, at least one. seed: of the draw.

        Raises:
            InvalidInput: there is one group only, or nothing is left on a side.
        """
        chosen = self.draw_held_out(share, seed)
        return self.select(~chosen), self.select(chosen)

    def draw_held_out(self, share: float = 0.2, seed: int = 0) -> Bool[Tensor, " sequences"]:
        """Which sequences are held out by `split`."""
        share, seed = check_number("pairs: share", share), check_whole("pairs: seed", seed)
        groups = torch.arange(len(self)) if self.groups is None else self.groups
        known = groups.unique()
        held = max(1, round(share * len(known)))
        if not 0 < share < 1 or held >= len(known):
            raise InvalidInput(
                f"pairs: {share} of {len(known)} groups (prompts) cannot be held out; give pairs "
                "of more prompts, or a share above 0 and below 1"
            )
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
        return torch.isin(groups, known[order[:held].to(known.device)])

    def blocks(
        self, rows: int = 4096, *, where: Bool[Tensor, " sequences"] | None = None
    ) -> "Iterator[PairedRows]":
        """Whole sequences, together at most about so many rows; at least one sequence.

        Args:
            rows: of a block. where: sequences that are taken; all by default, which copies nothing.
        """
        size = max(1, rows // max(1, self.tokens))
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            block = self.select(part)
            block = block if where is None else block.select(where[part])
            if len(block):
                yield block

    def flat(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [rows, d_source], y [rows, d_target] and weights [rows] of all tokens that count."""
        x, y = self.x.flatten(0, 1), self.y.flatten(0, 1)
        if self.weights is None:
            return x, y, None
        weights = self.weights.flatten()
        kept = weights > 0
        return x[kept], y[kept], weights[kept]

    def moments(
        self,
        features: "Callable[[PairedRows], Tensor] | None" = None,
        *,
        gram: bool = False,
        where: Bool[Tensor, " sequences"] | None = None,
    ) -> CrossMoments:
        """The cross moments of all pairs, block by block.

        Args:
            features: what stands for x, [sequences, tokens, features] of a block.
            gram: see `CrossMoments`. where: sequences that count; all by default.

        Raises:
            InvalidInput: a row is not finite, or no row counts.
        """
        found: CrossMoments | None = None
        for block in self.blocks(where=where):
            x = block.x if features is None else features(block)
            if found is None:
                found = CrossMoments(x.shape[-1], self.d_target, gram=gram, device=x.device)
            found.add(x, block.y, block.weights)
        if found is None or not found.rows:
            raise InvalidInput("pairs: there are no rows that count")
        return found
