"""Recordings and tensors as rows [rows, steps, features] of one site."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.engine import Activation, of_tensor, one_branch, token_means
from dreamreader.errors import InvalidInput

Recorded = Activation | Mapping[str, Activation] | Mapping[str, Tensor]


@dataclass(frozen=True)
class SiteRows:
    """The rows of one site in one batch.

    Attributes:
        values: mean over tokens; features with heads side by side.
        steps: index of each step; () where the rows have no steps of a run, so that one direction
            serves all.
        tokens: how many tokens were averaged in each row; None where the rows have own numbers.
    """

    values: Float[Tensor, "rows steps features"]
    steps: tuple[int, ...]
    tokens: int | None


def site_rows(recorded: Recorded, shared: bool) -> dict[str, SiteRows]:
    """The rows of every site.

    Args:
        recorded: a cache, an activation, or tensors by site, which are [rows, features], [rows,
            steps, features] or [rows, steps, tokens, features].
        shared: whether a row is averaged over its steps.

    Raises:
        InvalidInput: there is no site, several branches are recorded, or a tensor's shape is wrong.
    """
    if isinstance(recorded, Activation):
        recorded = {recorded.site: recorded}
    if isinstance(recorded, Tensor) or not isinstance(recorded, Mapping):
        kind = type(recorded).__name__
        raise InvalidInput(
            f"rows come as a Cache, an Activation or a mapping from site to tensor, got {kind}"
        )
    if not recorded:
        raise InvalidInput("the recording has no sites")
    return {site: _site(site, found, shared) for site, found in recorded.items()}


def _site(site: str, found: Activation | Tensor, shared: bool) -> SiteRows:
    if isinstance(found, Activation):
        values = one_branch(site, found)
        steps = tuple(moment.step for moment in found.steps)
        if len(steps) == 1 and math.isnan(found.steps[0].timestep):
            steps = ()  # outside of the denoising, such as a text encoder or a prompt
    else:
        values, steps = of_tensor(site, found)
    tokens = values.shape[2]
    if tokens == 0 or values.shape[1] == 0 or values.shape[3] == 0:
        raise InvalidInput(f"{site}: {list(values.shape)} holds no values")
    named = isinstance(found, Activation)
    if tokens == 1 and not (named and found.padding is not None):
        rows = values[:, :, 0]  # a view: a million rows are read once, by the sums
    else:
        rows = token_means(site, found) if named else values.double().mean(2)
    if isinstance(found, Activation) and found.positions is not None:
        tokens = None
    if shared:
        rows = rows if rows.shape[1] == 1 else rows.double().mean(1, keepdim=True)
        return SiteRows(rows, (), tokens)
    distinct = tuple(dict.fromkeys(steps))
    if len(distinct) < len(steps):  # a second-order solver evaluates a step twice
        places = [[n for n, step in enumerate(steps) if step == each] for each in distinct]
        rows = torch.stack([rows[:, place].double().mean(1) for place in places], 1)
    return SiteRows(rows, distinct, tokens)
