"""Scheduler steps that take the picture from one prediction and the direction from another."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dreamreader.engine import stepping
from dreamreader.errors import InvalidInput
from dreamreader.localise.hspace_twin import Twin

MARK = "_dreamreader_split"  # on a step that takes twins


@contextmanager
def split_steps(scheduler: Any, boost: float | None) -> Iterator[None]:
    """Let this one scheduler object take twins in its `step`.

    Raises:
        InvalidInput: how its step splits into picture and direction is not known.
    """
    split = _split_of(scheduler)
    if boost is not None and split is not _ddim:
        raise InvalidInput(
            f"asymmetric: boost draws noise as DDIM does with eta = 1; {_kind(scheduler)} cannot"
        )

    def around(original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        given = call.arguments
        if boost is not None and float(given["timestep"]) <= boost:
            given["eta"] = 1.0
        prediction = given["model_output"]
        if not isinstance(prediction, Twin):
            return original(*call.args, **call.kwargs)
        as_object = given.get("return_dict", True)
        given["model_output"], given["return_dict"] = prediction.plain, True
        output = original(*call.args, **call.kwargs)
        weight, before, after = split(scheduler, given, prediction)
        moved = output.prev_sample + weight * (after - before)
        output.prev_sample = moved.to(output.prev_sample.dtype)
        if getattr(output, "pred_original_sample", None) is not None:
            output.pred_original_sample = after.to(output.pred_original_sample.dtype)
        return output if as_object else output.to_tuple()

    with stepping(scheduler, around):
        setattr(scheduler.step, MARK, True)
        yield


Split = tuple[Tensor | float, Tensor, Tensor]
"""Weight of the predicted picture in the step's result; the picture without and with the edits."""


def _ddim(scheduler: Any, given: Mapping[str, Any], prediction: Twin) -> Split:
    time, config = int(given["timestep"]), scheduler.config
    earlier = time - config.num_train_timesteps // scheduler.num_inference_steps
    kept = scheduler.alphas_cumprod
    a = kept[time]
    a_next = kept[earlier] if earlier >= 0 else scheduler.final_alpha_cumprod

    def picture(m: Tensor, x: Tensor) -> Tensor:
        if config.prediction_type == "sample":
            found = m
        elif config.prediction_type == "v_prediction":
            found = a.sqrt() * x - (1 - a).sqrt() * m
        else:
            found = (x - (1 - a).sqrt() * m) / a.sqrt()
        if config.thresholding:
            return scheduler._threshold_sample(found)
        limit = config.clip_sample_range
        return found.clamp(-limit, limit) if config.clip_sample else found

    return a_next.sqrt(), *_both(picture, given, prediction)


def _euler(scheduler: Any, given: Mapping[str, Any], prediction: Twin) -> Split:
    """x = x_0 + sigma eps, so a step is x_0 + sigma' eps."""
    sigma, _ = _levels(scheduler, given)
    kind = scheduler.config.prediction_type

    def picture(m: Tensor, x: Tensor) -> Tensor:
        if kind in ("sample", "original_sample"):
            return m
        if kind == "v_prediction":
            return x / (sigma**2 + 1) - m * sigma / (sigma**2 + 1).sqrt()
        return x - sigma * m

    return 1.0, *_both(picture, given, prediction)


def _flow(scheduler: Any, given: Mapping[str, Any], prediction: Twin) -> Split:
    """x = (1 - sigma) x_0 + sigma noise and m = noise - x_0."""
    if given.get("per_token_timesteps") is not None or scheduler.config.get("invert_sigmas"):
        raise InvalidInput(
            "asymmetric: FlowMatchEulerDiscreteScheduler with a timestep for each token, or with "
            "invert_sigmas, is not supported"
        )
    sigma, after = _levels(scheduler, given)
    return 1 - after, *_both(lambda m, x: x - sigma * m, given, prediction)


_SPLITS: dict[str, Callable[[Any, Mapping[str, Any], Twin], Split]] = {
    "DDIMScheduler": _ddim,
    "EulerDiscreteScheduler": _euler,
    "FlowMatchEulerDiscreteScheduler": _flow,
}


def _split_of(scheduler: Any) -> Callable[[Any, Mapping[str, Any], Twin], Split]:
    """The split of the class that defines this scheduler's `step`."""
    if _kind(scheduler) not in _SPLITS:
        raise InvalidInput(
            f"asymmetric: how a step of {type(scheduler).__name__} splits into predicted picture "
            f"and direction is not known; supported: {', '.join(_SPLITS)}"
        )
    return _SPLITS[_kind(scheduler)]


def _kind(scheduler: Any) -> str:
    return next(each.__name__ for each in type(scheduler).__mro__ if "step" in vars(each))


def _levels(scheduler: Any, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Noise levels at the start and the end of the step that the scheduler has just done."""
    if given.get("s_churn"):
        raise InvalidInput(
            f"asymmetric: s_churn={given['s_churn']} raises the noise level within a step, which "
            "is not supported; use 0"
        )
    entry = scheduler.step_index - 1
    return scheduler.sigmas[entry], scheduler.sigmas[entry + 1]


def _both(
    picture: Callable[[Tensor, Tensor], Tensor], given: Mapping[str, Any], prediction: Twin
) -> tuple[Tensor, Tensor]:
    """The predicted picture without and with the edits, in float32 or wider."""
    sample = given["sample"]
    wide = torch.promote_types(sample.dtype, torch.float32)
    x = sample.to(wide)
    return picture(prediction.plain.to(wide), x), picture(prediction.edited.to(wide), x)
