"""Training autoencoders: the recipe of the field, several in one pass, exact when it goes on."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch

from dreamreader._progress import Progress
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.fitting import ByStep, History, Recipe, fit
from dreamreader.sae.inputs import check_mask, layout_of
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.objective import Anneal, Reconstruction, ScoreCurve, rows_of
from dreamreader.sae.optimizer import StridedAdam
from dreamreader.sae.ranks import Ranks
from dreamreader.sae.selection import JumpReLU

Batches = ByStep | Iterable[Any] | Callable[[int], Iterable[Any]]
_WARMUP = 1000


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
    curve: ScoreCurve | None = None,
    of: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
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
        curve: takes scores after some steps, see `ScoreCurve`.
        ranks: processes that train the same autoencoders, each on its share of every batch.
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
    _check_options(steps, center, validate, curve, of)
    if compute not in ("float32", "bfloat16"):
        raise UnknownName("compute of train_sae", str(compute), ("float32", "bfloat16"))
    if (k_start is None) != (k_steps is None):
        raise InvalidInput("train_sae: k_start and k_steps belong together")
    for name, each in saes.items():
        _check(name, each, batches)
    anneal = None if k_start is None or k_steps is None else Anneal(k_start, k_steps)
    if anneal is not None and any(isinstance(s.selection, JumpReLU) for s in saes.values()):
        raise InvalidInput("train_sae: k_start needs a selection with a k; JumpReLU has none")
    if ranks is not None and not isinstance(ranks, Ranks):
        raise InvalidInput(f"train_sae: ranks is a Ranks of torch.distributed, got {ranks!r}")
    goals = {name: Reconstruction(name, anneal, curve, ranks) for name in saes}
    recipes = {
        name: _recipe(each, steps, epochs, lr, warmup, validate is not None, recipe)
        for name, each in saes.items()
    }
    fresh = {name: each for name, each in saes.items() if not int(each.steps)}
    if fresh:
        _begin(fresh, first_batch(batches), center, ranks)
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
            validate=None if validate is None else _validate_in_eval(saes, validate, several),
            before_step={name: each.before_step for name, each in goals.items()},
            after_step={name: each.after_step for name, each in goals.items()},
            of={"autoencoders": [each.describe() for each in saes.values()], "compute": compute}
            | dict(of or {}),
            state=None if curve is None else {"curve": curve},
            save_every=save_every,
            check_every=None,
        )
    finally:
        for each in saes.values():
            each.compute_dtype = None
            each.eval()
    idle = [name for name, each in histories.items() if not each.losses]
    if idle:
        raise InvalidInput(
            f"train_sae: no batch had rows for {', '.join(idle) or 'the autoencoder'}: batches by "
            "name need the autoencoder's name, or the site in its metadata"
        )
    return histories if several else histories[""]


def first_batch(batches: Batches) -> Any:
    """The first batch of a training, which reads it again.

    Raises:
        InvalidInput: there is none, or it can be read only once.
    """
    if isinstance(batches, ByStep):
        return batches.draw(0)
    source: Any = batches(0) if callable(batches) else batches
    if not isinstance(source, Iterable):
        raise InvalidInput(
            "train_sae: batches are a list, a dataset, ByStep, or a function of the epoch that "
            f"gives an iterator, got {type(source).__name__}"
        )
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


def _check_options(steps: Any, center: Any, validate: Any, curve: Any, of: Any) -> None:
    """Refuses what is of another type; `fit` and `Recipe` look at the rest."""
    whole = isinstance(steps, int) and not isinstance(steps, bool)
    for name, value, words, right in (
        ("steps", steps, "a whole number", steps is None or whole),
        ("center", center, "True or False", isinstance(center, bool)),
        ("validate", validate, "a function", validate is None or callable(validate)),
        ("curve", curve, "a ScoreCurve", curve is None or isinstance(curve, ScoreCurve)),
        ("of", of, "plain values by name", of is None or isinstance(of, Mapping)),
    ):
        if not right:
            raise InvalidInput(f"train_sae: {name} is {words}, got {value!r:.60}")


def _check(name: Any, sae: Any, batches: Any) -> None:
    if not isinstance(name, str):
        raise InvalidInput(f"train_sae: names of autoencoders are text, got {name!r}")
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
    rate = 2e-4 / math.sqrt(sae.d_sae / 2**14) if lr is None else lr
    decay = more.get("weight_decay", 0.0)
    usual: dict[str, Any] = {
        # one kernel for all of a step: three times as fast on a CPU as torch's loop
        "optimizer": lambda own: StridedAdam(own, lr=rate, weight_decay=decay, fused=True),
        "lr": rate,
        "warmup": min(_WARMUP, (steps or 10 * _WARMUP) // 10) if warmup is None else warmup,
        "schedule": "wsd",
        "decay": 0.2,
        "grad_clip": 1.0,
        "validate_every": 1000 if validated else None,
    }
    return Recipe(steps=steps, epochs=epochs, **usual | dict(more))


@torch.no_grad()
def _begin(
    saes: Mapping[str, SparseAutoencoder], batch: Any, center: bool, ranks: Ranks | None
) -> None:
    """Scale of inputs and b_dec of autoencoders that have not learned yet."""
    for name, sae in saes.items():
        x, mask = rows_of(batch, (name, sae.metadata.get("site")))
        if x is None:
            continue
        if mask is not None:
            counted = check_mask(mask, layout_of(x, sae.d_in, sae.reshape).batch)
            x = x.reshape(-1, sae.d_in)[counted]
        if not x.numel():
            raise InvalidInput("train_sae: no token counts in the first batch")
        x = x if ranks is None else ranks.gather_rows(x)
        untouched = bool((sae.input_scale == 1).all() & (sae.input_shift == 0).all())
        if sae.normalise in ("average_norm", "standardise") and untouched:
            sae.fit_normalisation(x)
        if center:
            sae.center_on(x)


def _validate_in_eval(
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
