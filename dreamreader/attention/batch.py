"""Running sums of one batch of rows, and how they become maps."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.engine import Attention, Call, Row
from dreamreader.errors import InvalidInput
from dreamreader.report.heat import resize


@dataclass(eq=False)
class WordTokens:
    """The text keys that are summed for every row.

    Attributes:
        keys: of each row, each once. words: of each word of each row, places in `keys`.
        prompt: places in `keys` of each row's whole prompt; empty where nothing is normalised.
    """

    keys: list[list[int]]
    words: list[list[list[int]]]
    prompt: list[list[int]]

    @property
    def most(self) -> int:
        return max(map(len, self.keys))

    def weights(self, keys: int) -> Float[Tensor, "rows tokens keys"]:
        """One row of weights for each token, 1 at its key."""
        found = torch.zeros(len(self.keys), self.most, keys)
        for row, own in enumerate(self.keys):
            found[row, torch.arange(len(own)), torch.tensor(own, dtype=torch.long)] = 1
        return found

    def means(self) -> Float[Tensor, "rows words tokens"]:
        """The mean over the tokens of every word; NaN for words that a row does not have."""
        found = torch.zeros(len(self.keys), max(map(len, self.words)), self.most)
        for row, words in enumerate(self.words):
            for number, places in enumerate(words):
                found[row, number, places] = 1 / len(places)
            found[row, len(words) :] = torch.nan
        return found

    def whole(self) -> Float[Tensor, "rows tokens"]:
        """The sum over the tokens of the prompt."""
        found = torch.zeros(len(self.keys), self.most)
        for row, places in enumerate(self.prompt):
            found[row, places] = 1
        return found


@dataclass(eq=False)
class Layer:
    """One site: sums over time of the attention to every token, [rows, heads, tokens, queries].

    `sums` has one entry, or one for each step where steps are kept apart.
    """

    grid: tuple[int, int]
    weights: Float[Tensor, "rows tokens keys"]
    sums: dict[int, Tensor] = field(default_factory=dict)

    def add(self, attention: Attention, call: Call, slot: int) -> None:
        regions = call.image
        first, last = regions[0]
        if slot not in self.sums:
            shape = (attention.shape[0], attention.shape[1], self.weights.shape[1], last - first)
            self.sums[slot] = torch.zeros(
                shape, dtype=self.weights.dtype, device=self.weights.device
            )
        out = self.sums[slot]
        if len(set(regions)) == 1:
            attention.words_(out, self.weights, slice(first, last))
            return
        for row, (start, stop) in enumerate(regions):  # prompts of different length before them
            one = slice(row, row + 1)
            attention.of([row]).words_(out[one], self.weights[one], slice(start, stop))


class AttentionBatch:
    """All layers of one run of the subject."""

    def __init__(
        self, call: Call, words: list[tuple[str, ...]], tokens: WordTokens, per_step: bool
    ):
        whole = call.whole_grid
        assert whole is not None  # there are image tokens
        self.rows: tuple[Row, ...] = call.rows
        self.words = words
        self.tokens = tokens
        self.per_step = per_step
        self.size: tuple[int, int] = whole
        self.layers: dict[str, Layer] = {}
        self.steps: dict[int, None] = {}

    def add(self, attention: Attention, call: Call, tokens: WordTokens) -> None:
        """Add one call, or the share of one that the model forms at a time."""
        step = call.instant.step if call.instant is not None else 0
        self.steps[step] = None
        layer = self.layers.get(call.site)
        if layer is None:
            dtype = torch.float64 if attention.dtype == torch.float64 else torch.float32
            weights = tokens.weights(attention.shape[3]).to(attention.device, dtype)
            assert call.grid is not None
            layer = self.layers[call.site] = Layer(call.grid, weights)
        layer.add(attention, call, step if self.per_step else 0)

    def heads(self) -> list[tuple[str, int]]:
        """(site, number) of every head, in the order of the layers."""
        return [
            (site, head)
            for site, layer in self.layers.items()
            for head in range(next(iter(layer.sums.values())).shape[1])
        ]

    def maps(
        self, apart: str | None, size: tuple[int, int] | None, normalise: bool
    ) -> Float[Tensor, "rows words steps layers h w"]:
        """Maps of the words from the sums.

        Args:
            apart: `heads` or `layers` to keep them apart, None for the mean over all heads.
            size: of the maps; that of the whole grid where None.
            normalise: divide by the sum over the prompt's tokens in each pixel + 1e-6.
        """
        slots = list(self.steps) if self.per_step else [0]
        found = [self._tokens(slot, apart, size or self.size) for slot in slots]
        tokens = torch.stack(found, 2)  # [rows, tokens, steps, layers, h, w]
        if normalise:
            whole = torch.einsum("rt,rtslyx->rslyx", self.tokens.whole(), tokens)
            tokens = tokens / (whole + 1e-6).unsqueeze(1)
        return torch.einsum("rwt,rtslyx->rwslyx", self.tokens.means(), tokens)

    def _tokens(
        self, slot: int, apart: str | None, size: tuple[int, int]
    ) -> Float[Tensor, "rows tokens layers h w"]:
        kept: list[Tensor] = []
        total: Tensor | None = None
        count = 0
        for site, layer in self.layers.items():
            if slot not in layer.sums:
                raise InvalidInput(
                    f"per_step: {site} did not run at step {slot}, others did; leave it out"
                )
            grid = layer.sums[slot].unflatten(-1, layer.grid)
            maps = resize(grid, size).float().cpu()  # [rows, heads, tokens, h, w]
            if apart == "heads":
                kept.append(maps)
            elif apart == "layers":
                kept.append(maps.mean(1, keepdim=True))
            else:
                added = maps.sum(1, keepdim=True)
                total = added if total is None else total.add_(added)
                count += maps.shape[1]
        mean = [] if total is None else [total / count]
        return torch.cat(kept or mean, 1).transpose(1, 2)
