"""Recordings and tensors as the rows that a probe reads: pooled over tokens, step by step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.engine.cache import Activation
from dreamreader.engine.recorded import of_tensor, one_branch
from dreamreader.errors import InvalidInput, UnknownName

Recorded = Activation | Mapping[str, Activation] | Mapping[str, Tensor] | Tensor
POOLS = ("mean", "token", "flat")


@dataclass(frozen=True)
class Rows:
    """The values of one site.

    Attributes:
        values: [rows, steps, tokens, features], one token where tokens are pooled.
        site, branch: None where tensors came without a name.
        steps: index of each step; () where the rows have no steps of a run.
        fractions: share of the trajectory done at each step.
        prompts: of the rows, where all are known.
    """

    values: Float[Tensor, "rows steps tokens features"]
    site: str | None
    branch: str | None
    steps: tuple[int, ...]
    fractions: tuple[float, ...]
    prompts: tuple[str, ...] | None


def rows_of(recorded: Recorded, pool: str) -> Rows:
    """The rows of the one site of a recording.

    Args:
        recorded: an activation, a cache or mapping with one site, or a tensor: [rows, features],
            [rows, steps, features] or [rows, steps, tokens, features].
        pool: `mean` over tokens, `token` for each token as a row of its own, `flat` for all tokens
            side by side.

    Raises:
        UnknownName: of the pool.
        InvalidInput: several sites or branches, a shape that is none of these, or values that are
            not finite.
    """
    if pool not in POOLS:
        raise UnknownName("pool of a probe", pool, POOLS)
    site, found = _one_site(recorded)
    label = site or "recorded"
    if isinstance(found, Activation):
        rows = _of_activation(label, found)
    else:
        values, steps = of_tensor(label, found)
        shares = tuple(n / max(len(steps), 1) for n in range(values.shape[1]))
        rows = Rows(values, site, None, steps, shares, None)
    if not rows.values.numel():
        raise InvalidInput(f"{label}: {list(rows.values.shape)} holds no values")
    if not bool(rows.values.isfinite().all()):
        wrong = (~rows.values.isfinite()).flatten(1).any(1).nonzero().flatten()
        raise InvalidInput(
            f"{label}: {len(wrong)} of {len(rows.values)} rows have values that are not finite, "
            f"the first is row {int(wrong[0])}"
        )
    return Rows(pooled(rows.values, pool), *list(vars(rows).values())[1:])


def pooled(
    values: Float[Tensor, "rows steps tokens features"], pool: str
) -> Float[Tensor, "rows steps pooled features"]:
    """The values as a probe with this pool reads them, in float32."""
    if pool == "mean":
        return values.mean(2, keepdim=True, dtype=torch.float32)
    return (values.flatten(2).unsqueeze(2) if pool == "flat" else values).float()


def _one_site(recorded: Recorded) -> tuple[str | None, Activation | Tensor]:
    if isinstance(recorded, Tensor):
        return None, recorded
    if isinstance(recorded, Activation):
        return recorded.site, recorded
    if not isinstance(recorded, Mapping):
        raise InvalidInput(
            f"rows come as a Cache, an Activation or a tensor, got {type(recorded).__name__}"
        )
    if len(recorded) != 1:
        listed = ", ".join(list(recorded)[:4]) or "none"
        raise InvalidInput(f"a probe reads one site, the recording has {len(recorded)} ({listed})")
    return next(iter(recorded.items()))


def _of_activation(site: str, found: Activation) -> Rows:
    values, moments = one_branch(site, found), found.steps
    steps = tuple(moment.step for moment in moments)
    if len(steps) == 1 and math.isnan(moments[0].timestep):
        steps = ()  # outside of the denoising, such as a text encoder or a prompt
    # A second-order solver evaluates a step twice; its first evaluation has the step's noise level.
    first = (
        [n for n, moment in enumerate(moments) if steps.index(moment.step) == n] if steps else []
    )
    if len(first) < len(steps):
        values, steps = values[:, first], tuple(steps[n] for n in first)
    shares = tuple(moments[n].fraction for n in first) if steps else (0.0,)
    prompts = tuple(row.prompt for row in found.rows)
    known = None if None in prompts else prompts
    return Rows(values, site, found.branches[0], steps, shares, known)  # pyright: ignore
