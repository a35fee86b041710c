"""Training autoencoders: the recipe of the field, several in one pass, exact when it goes on."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from dreamreader._progress import Progress
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.fitting import ByStep, History, Objective, Recipe, fit
from dreamreader.sae.loss import SaeLoss
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.selection import JumpReLU, Selection, TopK

Batches = ByStep | Iterable[Any] | Callable[[int], Iterable[Any]]
# one kernel for all of a step: three times as fast on a CPU as torch's loop
_ADAM = {"Adam": {"betas": (0.9, 0.999), "fused": True}}
_WARMUP = 1000


class Anneal:
    """A number of active latents that falls to that of the selection.

    Formula: k at step t is k + (start - k) max(0, 1 - t / steps), rounded for TopK.

    Args:
        start: at the beginning. steps: until it has fallen.
    """

    def __init__(self, start: float, steps: int):
        if not start > 0 or steps < 1:
            raise InvalidInput(f"k_start is positive and k_steps at least 1, got {start}, {steps}")
        self.start, self.steps = start, steps

    def selection_at(self, selection: Selection, step: int, d_sae: int) -> Selection:
        """The selection of a step, counted from 0."""
        if isinstance(selection, JumpReLU) or step >= self.steps:
            return selection
        k = selection.k + (min(self.start, d_sae) - selection.k) * (1 - step / self.steps)
        return replace(selection, k=round(k) if isinstance(selection, TopK) else k)


class Reconstruction(Objective):
    """The loss of an autoencoder on batches, for `fit`; counters and thresholds move with it.

    Batches are x [..., d_in], (x, mask [...]), batches of a store with keys, or mappings from names
    to these, of which an autoencoder takes its own name's, else its site's.

    Args:
        name: of the autoencoder. anneal: of its k.
    """

    def __init__(self, name: str = "", anneal: Anneal | None = None):
        self.name, self.anneal = name, anneal
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
        module.before_step()

    def after_step(self, module: SparseAutoencoder, done: int) -> None:
        """Keeps constraints and counts what fired in the batch of this step."""
        assert self.result is not None
        module.after_step(self.result)


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


@overload
def train_sae(
    sae: SparseAutoencoder, batches: Batches, *, steps: int | None = None, **options: Any
) -> History: ...


@overload
def train_sae(
    sae: Mapping[str, SparseAutoencoder],
    batches: Batches,
    *,
    steps: int | None = None,
    **options: Any,
) -> dict[str, History]: ...


def train_sae(
    sae: Any,
    batches: Batches,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    k_start: float | None = None,
    k_steps: int | None = None,
    compute: str = "float32",
    center: bool = True,
    folder: str | os.PathLike[str] | None = None,
    save_every: int = 1000,
    progress: Progress = True,
    validate: Callable[[], Any] | None = None,
    of: Mapping[str, Any] | None = None,
    **recipe: Any,
) -> Any:
    """Trains an autoencoder in place, or several in one pass over the batches; leaves `eval()`.

    By default: Adam with a rate of 2e-4 / sqrt(d_sae / 2^14) that rises over 1000 steps (a tenth of
    fewer) and falls over the last fifth, gradients clipped at 1. Before the first step b_dec is set
    to the geometric median of the first batch, and the scale of inputs is taken from it.

    Args:
        sae: one, or several by name; parameters in float32, which are the masters of `compute`.
        batches: as `fit` takes them, such as a `StoreDataset`, or a function of the epoch that
            gives an iterator; each as `Reconstruction` says.
        steps, epochs: how long; the first that is reached.
        lr: the highest rate. warmup: steps in which it rises.
        k_start: active latents in the beginning, falling to k over k_steps steps.
        compute: `float32` or `bfloat16`: in which it multiplies.
        center: False leaves b_dec where it is.
        folder: for `training.safetensors`, from which the same call goes on, equal to the bit.
        save_every: steps between two writings of it.
        progress: shown by default; events have loss, FVU, L0, share of dead latents and tokens.
        validate: as in `fit`; autoencoders are in `eval()` mode meanwhile. of: as in `fit`.
        recipe: further attributes of `Recipe`, such as `schedule`, `grad_clip` and `seed`.

    Returns:
        The history; by name for several.

    Raises:
        NonFiniteLoss: a loss is not finite; names the step.
        InvalidInput, UnknownName: a value cannot be right, or widths of batches and autoencoder
            differ.

    Example:
        >>> from dreamreader.sae import BatchTopK
        >>> sae = SparseAutoencoder(8, 32, BatchTopK(4))
        >>> rows = torch.randn(512, 8)
        >>> history = train_sae(sae, list(rows.split(64)), epochs=40, lr=0.003)
        >>> history.losses[-1] < 0.5 * history.losses[0]
        True
    """
    several = isinstance(sae, Mapping)
    saes: dict[str, SparseAutoencoder] = dict(sae) if several else {"": sae}
    if compute not in ("float32", "bfloat16"):
        raise UnknownName("compute of train_sae", compute, ("float32", "bfloat16"))
    if (k_start is None) != (k_steps is None):
        raise InvalidInput("train_sae: k_start and k_steps belong together")
    for name, each in saes.items():
        _check(name, each, batches)
    anneal = None if k_start is None or k_steps is None else Anneal(k_start, k_steps)
    goals = {name: Reconstruction(name, anneal) for name in saes}
    recipes = {
        name: _recipe(each, steps, epochs, lr, warmup, validate is not None, recipe)
        for name, each in saes.items()
    }
    fresh = {name: each for name, each in saes.items() if not int(each.steps)}
    if fresh:
        _begin(fresh, first_batch(batches), center)
    for each in saes.values():
        each.train()
        each.compute_dtype = getattr(torch, compute) if compute != "float32" else None
    try:
        histories = fit(
            saes,
            goals,
            batches,
            recipes,
            folder,
            progress,
            validate=None if validate is None else _held_out(saes, validate, several),
            before_step={name: each.before_step for name, each in goals.items()},
            after_step={name: each.after_step for name, each in goals.items()},
            of={"autoencoders": [each.describe() for each in saes.values()], "compute": compute}
            | dict(of or {}),
            save_every=save_every,
            check_every=None,
        )
    finally:
        for each in saes.values():
            each.compute_dtype = None
            each.eval()
    return histories if several else histories[""]


def first_batch(batches: Batches) -> Any:
    """The first batch of a training, which reads it again.

    Raises:
        InvalidInput: there is none, or it can be read only once.
    """
    if isinstance(batches, ByStep):
        return batches.draw(0)
    source: Any = batches(0) if callable(batches) else batches
    iterator = iter(source)
    if iterator is source and not callable(batches):
        raise InvalidInput(
            "train_sae: these batches can be read only once; give a list, a dataset, or a function "
            "of the epoch that gives an iterator"
        )
    try:
        return next(iterator)
    except StopIteration:
        raise InvalidInput("train_sae: there are no batches") from None
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


def _check(name: str, sae: Any, batches: Any) -> None:
    title = f"{name}: " if name else ""
    if not isinstance(sae, SparseAutoencoder):
        raise InvalidInput(
            f"train_sae: {title}a SparseAutoencoder is trained, or several by name, got "
            f"{type(sae).__name__}"
        )
    if sae.W_dec.dtype not in (torch.float32, torch.float64):
        kind = str(sae.W_dec.dtype).removeprefix("torch.")
        raise InvalidInput(
            f"train_sae: {title}parameters are {kind}, in which small steps are lost; call "
            "sae.float() and give compute='bfloat16', which keeps them as float32 masters"
        )
    site = getattr(batches, "site", None)
    width = getattr(site, "width", None)
    if width is not None and width != sae.d_in:
        raise InvalidInput(
            f"train_sae: {title}rows of {getattr(site, 'name', 'the store')} have width {width}, "
            f"the autoencoder has d_in={sae.d_in}"
        )


def _recipe(
    sae: SparseAutoencoder,
    steps: int | None,
    epochs: int | None,
    lr: float | None,
    warmup: int | None,
    validated: bool,
    more: Mapping[str, Any],
) -> Recipe:
    known = Recipe.__dataclass_fields__
    for name in more:
        if name not in known:
            raise UnknownName("option of train_sae", name, known)
    usual: dict[str, Any] = {
        "optimizer": _ADAM,
        "lr": 2e-4 / math.sqrt(sae.d_sae / 2**14) if lr is None else lr,
        "warmup": min(_WARMUP, (steps or 10 * _WARMUP) // 10) if warmup is None else warmup,
        "schedule": "wsd",
        "decay": 0.2,
        "grad_clip": 1.0,
        "validate_every": 1000 if validated else None,
    }
    return Recipe(steps=steps, epochs=epochs, **usual | dict(more))


@torch.no_grad()
def _begin(saes: Mapping[str, SparseAutoencoder], batch: Any, center: bool) -> None:
    """Scale of inputs and b_dec of autoencoders that have not learned yet."""
    for name, sae in saes.items():
        x, mask = rows_of(batch, (name, sae.metadata.get("site")))
        if x is None:
            continue
        x = x if mask is None else x[mask]
        untouched = bool((sae.input_scale == 1).all() & (sae.input_shift == 0).all())
        if sae.normalise in ("average_norm", "standardise") and untouched:
            sae.fit_normalisation(x)
        if center:
            sae.center_on(x)


def _held_out(
    saes: Mapping[str, SparseAutoencoder], validate: Callable[[], Any], several: bool
) -> Callable[[], Any]:
    """Losses by name, found in `eval()` mode."""

    def losses() -> Any:
        for each in saes.values():
            each.eval()
        found = validate()
        for each in saes.values():
            each.train()
        return found if several else {"": found}

    return losses
