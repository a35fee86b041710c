"""What a training of autoencoders minimises in a batch, and what moves with each step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.fitting import Objective
from dreamreader.sae.loss import SaeLoss
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.ranks import Ranks
from dreamreader.sae.selection import JumpReLU, Selection, TopK


class Anneal:
    """A number of active latents that falls to that of the selection.

    Formula: k at step t is k + (start - k) max(0, 1 - t / steps), rounded for TopK.

    Args:
        start: at the beginning. steps: until it has fallen.
    """

    def __init__(self, start: float, steps: int):
        number = isinstance(start, int | float) and 0 < start < math.inf
        if not number or not isinstance(steps, int) or steps < 1:
            raise InvalidInput(
                f"k_start is positive and k_steps at least 1, got {start!r}, {steps!r}"
            )
        self.start, self.steps = start, steps

    def selection_at(self, selection: Selection, step: int, d_sae: int) -> Selection:
        """The selection of a step, counted from 0."""
        if isinstance(selection, JumpReLU) or step >= self.steps:
            return selection
        k = selection.k + (min(self.start, d_sae) - selection.k) * (1 - step / self.steps)
        return replace(selection, k=round(k) if isinstance(selection, TopK) else k)


class ScoreCurve:
    """Scores of autoencoders after some steps of their training; checkpoints keep them.

    Args:
        steps: numbers of steps after which they are measured, the first is 1.
        score: called with the name and the autoencoder in `eval()` mode; gives plain values.

    Attributes:
        points: by name, a list of (steps done, what `score` gave).
    """

    def __init__(
        self, steps: Sequence[int], score: Callable[[str, SparseAutoencoder], Mapping[str, Any]]
    ):
        whole = isinstance(steps, Sequence) and all(isinstance(each, int) for each in steps)
        if not whole or not steps or min(steps) < 1 or not callable(score):
            raise InvalidInput(
                "ScoreCurve: steps are whole numbers of at least 1 and score a function, got "
                f"{steps!r:.60} and {score!r:.60}"
            )
        self.steps, self.score = frozenset(steps), score
        self.points: dict[str, list[tuple[int, dict[str, Any]]]] = {}

    def add(self, name: str, sae: SparseAutoencoder, done: int) -> None:
        """Measures an autoencoder where a point is due."""
        if done not in self.steps:
            return
        sae.eval()
        found = dict(self.score(name, sae))
        sae.train()
        self.points.setdefault(name, []).append((done, found))

    def state_dict(self) -> dict[str, Any]:
        return {"points": {name: [list(p) for p in own] for name, own in self.points.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.points = {
            name: [(done, dict(found)) for done, found in own]
            for name, own in state["points"].items()
        }


class Reconstruction(Objective):
    """The loss of an autoencoder on batches, for `fit`; counters and thresholds move with it.

    Batches are x [..., d_in], (x, mask [...]), batches of a store with keys, or mappings from names
    to these, of which an autoencoder takes its own name's, else its site's.

    Args:
        name: of the autoencoder. anneal: of its k. curve: takes its scores after some steps.
        ranks: processes that share each batch.
    """

    def __init__(
        self,
        name: str = "",
        anneal: Anneal | None = None,
        curve: ScoreCurve | None = None,
        ranks: Ranks | None = None,
    ):
        self.name, self.anneal, self.curve, self.ranks = name, anneal, curve, ranks
        self.result: SaeLoss | None = None

    def terms(self, module: SparseAutoencoder, batch: Any, /) -> Tensor | None:
        x, mask = rows_of(batch, (self.name, module.metadata.get("site")))
        if x is None:
            return None
        x = x.to(module.W_dec.device)
        selection = module.selection
        if self.anneal is not None:
            selection = self.anneal.selection_at(selection, int(module.steps), module.d_sae)
        mask = None if mask is None else mask.to(x.device)
        self.result = module.loss(x, mask, selection)
        return self.result.total

    def culprit(self, module: SparseAutoencoder, batch: Any, /) -> str:
        fine = self.result is not None and bool(self.result.mse.isfinite())
        return "aux-k" if fine else "squared error"

    def metrics(self, module: SparseAutoencoder, /) -> dict[str, float]:
        if self.result is None:
            return {}
        own = {name: getattr(self.result, name).item() for name in ("fvu", "l0", "dead")}
        return own | {"tokens": float(self.result.tokens)}

    def identity(self) -> Any:
        return None if self.anneal is None else [self.anneal.start, self.anneal.steps]

    def before_step(self, module: SparseAutoencoder, done: int) -> None:
        """Takes from the gradient of the decoder what would only change lengths."""
        if self.ranks is not None:
            self.ranks.average_gradients(module)
        module.before_step()

    def after_step(self, module: SparseAutoencoder, done: int) -> None:
        """Keeps constraints and counts what fired in the batch of this step."""
        assert self.result is not None
        if self.ranks is not None:
            self.result = self.ranks.combine(self.result)
        module.after_step(self.result)
        if self.curve is not None:
            self.curve.add(self.name, module, done)


def rows_of(batch: Any, names: Iterable[Any] = ()) -> tuple[Tensor | None, Tensor | None]:
    """Rows of a batch and their mask; no rows where it has none under these names.

    Raises:
        InvalidInput: it is none of the kinds of batches.
    """
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in names if name in batch), None)
        return (None, None) if found is None else rows_of(found)
    if isinstance(getattr(batch, "values", None), Tensor):  # of a store, with keys
        return batch.values, None
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        x, mask = batch
        if isinstance(x, Tensor) and (mask is None or isinstance(mask, Tensor)):
            return x, mask
    raise InvalidInput(
        "train_sae: a batch is x [..., d_in], (x, mask), or a mapping of these by name, got "
        f"{type(batch).__name__}"
    )
