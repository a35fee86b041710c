"""How a change of the predicted noise reads in the terms of a scheduler's prediction."""

import math
from typing import Any

from dreamreader.engine import DenoiserCall
from dreamreader.errors import InvalidInput

_KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def weight(scheduler: Any, moment: DenoiserCall) -> float | None:
    """w for which prediction + w grad is the prediction guided by grad, the gradient of log p(y|x).

    The score of x = alpha x_0 + sigma eps is -eps / sigma, so guidance is eps' = eps - sigma grad.
    With v = alpha eps - sigma x_0 that is v' = v - (sigma / alpha) grad; of the predicted x_0 it is
    x_0' = x_0 + (sigma^2 / alpha) grad; and of flow matching, alpha = 1 - sigma and
    v = eps - x_0, v' = v - sigma / (1 - sigma) grad. The gradient is that at the denoiser's own
    input, which has alpha^2 + sigma^2 = 1 unless it is flow matching.

    Returns:
        w; None at pure noise, alpha = 0, where only eps itself has a finite one.

    Raises:
        InvalidInput: what the scheduler's prediction stands for, or its noise level, is not known.

    Reference:
        Dhariwal and Nichol, Diffusion models beat GANs on image synthesis (2021), algorithm 2.
    """
    config, name = scheduler.config, type(scheduler).__name__
    is_flow = name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
    kind = "flow_prediction" if is_flow else config.get("prediction_type")
    if kind not in _KINDS or "EDM" in name or name.startswith("Cosine"):
        raise InvalidInput(
            f"latent_guidance: what {name} predicts ({kind}) is not known; known are "
            f"{', '.join(_KINDS)}"
        )
    level = moment.sigma
    if level is None:
        raise InvalidInput(f"latent_guidance: the noise level of {name} is not known")
    if kind == "flow_prediction":
        return None if level >= 1 else -level / (1 - level)
    alpha = 1 / math.sqrt(1 + level * level)  # 0 for an infinite level
    sigma = math.sqrt(1 - alpha * alpha)
    if kind == "epsilon":
        return -sigma
    if alpha == 0:
        return None
    return -sigma / alpha if kind == "v_prediction" else sigma * sigma / alpha
