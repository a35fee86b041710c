"""Recordings and tensors as the rows that a probe reads: pooled over tokens, step by step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamreader.engine import Activation, of_tensor, one_branch, token_means
from dreamreader.errors import InvalidInput, UnknownName

Recorded = Activation | Mapping[str, Activation] | Mapping[str, Tensor] | Tensor
POOLS = ("mean", "token", "flat")


@dataclass(frozen=True)
class ProbeRows:
    """The values of one site.

    Attributes:
        values: [rows, steps, tokens, features], one token where tokens are pooled; 0 at padding.
        site, branch: None where tensors came without a name.
        steps: index of each step; () where the rows have no steps of a run.
        fractions: share of the trajectory done at each step.
        prompts: of the rows, where all are known.
        real: [rows, steps, tokens] bool, which tokens are no padding; None: all.
    """

    values: Float[Tensor, "rows steps tokens features"]
    site: str | None
    branch: str | None
    steps: tuple[int, ...]
    fractions: tuple[float, ...]
    prompts: tuple[str, ...] | None
    real: Bool[Tensor, "rows steps tokens"] | None = None

    @property
    def each(self) -> Bool[Tensor, "rows steps tokens"]:
        """`real`, also where it is all."""
        whole = torch.ones(self.values.shape[:3], dtype=torch.bool, device=self.values.device)
        return whole if self.real is None else self.real


def rows_of(recorded: Recorded, pool: str) -> ProbeRows:
    """The rows of the one site of a recording.

    Args:
        recorded: an activation, a cache or mapping with one site, or a tensor: [rows, features],
            [rows, steps, features] or [rows, steps, tokens, features].
        pool: `mean` over tokens, `token` for each token as a row of its own, `flat` for all tokens
            side by side. Padding is no token.

    Raises:
        UnknownName: of the pool.
        InvalidInput: several sites or branches, a shape that is none of these, values that are
            not finite, a row of padding alone, or `flat` of rows with different numbers of tokens.
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
        rows = ProbeRows(values, site, None, steps, shares, None)
    if not rows.values.numel():
        raise InvalidInput(f"{label}: {list(rows.values.shape)} holds no values")
    if not bool(rows.values.isfinite().all()):
        wrong = (~rows.values.isfinite()).flatten(1).any(1).nonzero().flatten()
        raise InvalidInput(
            f"{label}: {len(wrong)} of {len(rows.values)} rows have values that are not finite, "
            f"the first is row {int(wrong[0])}"
        )
    if rows.real is None or pool == "token":
        return replace(rows, values=pool_values(rows.values, pool))
    if pool == "mean":
        assert isinstance(found, Activation)
        means = token_means(label, found)[:, _first_evaluations(found)]
        return replace(rows, values=means.float().unsqueeze(2), real=None)
    least, most = (int(each) for each in rows.real.sum(2).aminmax())
    raise InvalidInput(
        f"{label}: the rows have {least} to {most} tokens, and pool 'flat' reads as many of each "
        "side by side; record as many with tokens=, or take pool 'mean' or 'token'"
    )


def pool_values(
    values: Float[Tensor, "rows steps tokens features"], pool: str
) -> Float[Tensor, "rows steps pooled features"]:
    """Values without padding as a probe with this pool reads them, in float32."""
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


def _of_activation(site: str, found: Activation) -> ProbeRows:
    values, moments = one_branch(site, found), found.steps
    steps = tuple(moment.step for moment in moments)
    if len(steps) == 1 and math.isnan(moments[0].timestep):
        steps = ()  # outside of the denoising, such as a text encoder or a prompt
    first, padding = _first_evaluations(found), found.padding
    real = None if padding is None else ~padding.to(values.device)
    if len(first) < len(steps):
        values, steps = values[:, first], tuple(steps[n] for n in first)
        real = None if real is None else real[:, first]
    if real is not None:
        values = torch.where(real[..., None], values, 0)
    shares = tuple(moments[n].fraction for n in first) if steps else (0.0,)
    prompts = tuple(row.prompt for row in found.rows)
    known = None if None in prompts else prompts
    return ProbeRows(values, site, found.branches[0], steps, shares, known, real)  # pyright: ignore


def _first_evaluations(found: Activation) -> list[int]:
    """Of every step the first: a second-order solver evaluates one twice, and not at its noise."""
    steps = [moment.step for moment in found.steps]
    return [n for n, step in enumerate(steps) if steps.index(step) == n]
