"""From two lists of prompts to trained adapters, in one call."""

from collections.abc import Sequence
from typing import Any

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.recording.calls import record_calls, row_seeds
from dreamreader.recording.pairs import check_pairs, record_pairs
from dreamreader.reft.diffusion import NoiseMatch
from dreamreader.reft.losses import ActivationMatch, Loss, Together, keep_activations
from dreamreader.reft.model import Reft
from dreamreader.reft.train import train
from dreamreader.reft.usual import USUAL

LOSSES = ("activations", "noise")


def fit_pairs(
    reader: Reader,
    base: Sequence[str],
    teacher: Sequence[str],
    sites: str | Sequence[str],
    *,
    rank: int = 8,
    variant: str = "loreft",
    per_step: bool = False,
    loss: str = "activations",
    trajectory: str = "base",
    keep: Sequence[str] = (),
    keep_weight: float = 1.0,
    branch: str = "cond",
    tokens: Any = None,
    init: str = "identity",
    seeds: int | Sequence[int] = 0,
    settings: dict[str, Any] | None = None,
    **training: Any,
) -> Reft:
    """Trains adapters that turn what the base prompts give into what the teacher prompts give.

    Args:
        reader: of a pipeline, or of a language model with `loss="activations"`.
        base, teacher: prompts; row i of one belongs to row i of the other.
        sites: site strings; patterns stand for all that they match.
        rank, variant, tokens, init: of the adapters, see `Reft`.
        per_step: one adapter for each denoising step instead of one for all.
        loss: `activations` matches the teacher's activations, each site by itself, without running
            the model again; `noise` matches its predictions, through the whole denoiser.
        trajectory: whose latents both prompts see: `base`, `teacher`, or with activations `own`.
        keep: prompts that shall stay as they are; keep_weight: of their loss.
        branch: guidance branch; give it to `Reft.edits` too.
        seeds: of the rows.
        settings: arguments of the run, such as `num_inference_steps`.
        training: see `train`; by default 300 steps of 64 calls at a rate of 0.01 (noise: 150 steps
            of 16 at 0.005, with gradients clipped at 1).

    Limits: where later sites read what earlier ones were made to say, as in the joint attentions of
    a transformer, activations matched site by site do not add up: use `noise`.

    Returns:
        The adapters. `reft.edits(alpha, branch=branch)` are their edits.

    Raises:
        InvalidInput, UnknownName, NeverFired, NonFiniteLoss: as `record_pairs`, `Reft.for_sites`
            and `train`.

    Example:
        >>> reft = fit_pairs(                                           # doctest: +SKIP
        ...     reader, ["a red circle"], ["a red circle with a frame"], "unet.**.attn2"
        ... )
        >>> reader.run("a blue star", edits=reft.edits(branch="cond"))  # doctest: +SKIP
    """
    check_pairs(base, teacher)
    if loss not in LOSSES:
        raise UnknownName("loss of pairs", loss, LOSSES)
    given: dict[str, Any] = {"branch": branch, **(settings or {})}
    given["progress"] = training.get("progress", True)
    numbers = row_seeds(seeds, len(base))
    data: Any = {"seeds": numbers, "trajectory": trajectory, **given}
    if loss == "activations":
        found, steps = _activations(reader, base, teacher, sites, keep, keep_weight, tokens, data)
    else:
        found, steps = _noise(reader, base, teacher, keep, keep_weight, data)
    made = Reft.for_sites(
        reader,
        sites,
        rank,
        variant,
        per_step=steps if per_step else None,
        tokens=tokens,
        init=init,
        seed=training.get("seed", 0),
        **(settings or {}),
    )
    train(made, found, **USUAL[loss] | training)
    return made


def _activations(
    reader: Reader,
    base: Sequence[str],
    teacher: Sequence[str],
    sites: str | Sequence[str],
    keep: Sequence[str],
    weight: float,
    tokens: Any,
    data: dict[str, Any],
) -> tuple[Loss, int | None]:
    pairs = record_pairs(reader, base, teacher, sites, tokens=tokens, **data)
    loss = ActivationMatch(pairs)
    steps = None if pairs.steps is None else max(pairs.steps) + 1
    if not keep:
        return loss, steps
    same = record_pairs(
        reader, keep, keep, sites, tokens=tokens, **data | {"seeds": data["seeds"][0]}
    )
    return Together(loss, keep_activations(same, loss), weight), steps


def _noise(
    reader: Reader,
    base: Sequence[str],
    teacher: Sequence[str],
    keep: Sequence[str],
    weight: float,
    data: dict[str, Any],
) -> tuple[Loss, int | None]:
    trajectory = data.pop("trajectory")
    if trajectory not in ("base", "teacher"):
        raise InvalidInput(
            f"trajectory {trajectory!r}: predictions are matched on the same latents, "
            "base or teacher"
        )
    calls = [record_calls(reader, list(each), **data) for each in (base, teacher)]
    loss = NoiseMatch(reader, calls[0], calls[1], trajectory)
    steps = max(each.step for each in calls[0].moments) + 1
    if not keep:
        return loss, steps
    same = record_calls(reader, list(keep), **data | {"seeds": data["seeds"][0]})
    return Together(loss, NoiseMatch(reader, same, same), weight), steps
