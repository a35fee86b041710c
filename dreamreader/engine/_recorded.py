"""What is fitted to recordings takes them, or tensors in their place, in one layout."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from dreamreader.engine._cache import Activation
from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.errors import InvalidInput


def one_branch(site: str, activation: Activation) -> Float[Tensor, "rows steps tokens features"]:
    """The recorded values, heads side by side.

    Raises:
        InvalidInput: several branches are recorded.
    """
    if len(activation.branches) > 1:
        raise InvalidInput(
            f"{site}: recorded for the branches {', '.join(activation.branches)}; choose one, "
            "e.g. with select(branch='cond')"
        )
    values = activation.tensor
    return values.flatten(3) if values.ndim > 4 else values


def join_rows(parts: Sequence[Activation]) -> Activation:
    """One site's recordings of several batches, joined along the rows.

    Those of a text that have fewer tokens are padded in front.

    Raises:
        InvalidInput: they have different shapes, grids, timesteps or noise levels.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for each in parts[1:]:
        if each.hw != first.hw:
            raise _apart(first.site, "grids", first.hw, each.hw)
        times = [_time(step) for step in first.steps], [_time(step) for step in each.steps]
        for was, now in zip(*times, strict=True):
            if was != now:
                raise _apart(first.site, "steps", was, now)
    parts = _of_one_length(parts)
    if any(each.shape[1:] != parts[0].shape[1:] for each in parts):
        raise InvalidInput(
            f"recording {first.site}: batches have different shapes "
            f"({', '.join(str(list(each.shape)) for each in parts)}); use one batch"
        )
    known = [each.positions for each in parts if each.positions is not None]
    return replace(
        first,
        tensor=torch.cat([each.tensor for each in parts]),
        rows=tuple(row for each in parts for row in each.rows),
        tokens=first.tokens if all(each.tokens == first.tokens for each in parts) else None,
        positions=torch.cat(known) if len(known) == len(parts) else None,
    )


def _time(instant: StepInfo) -> str:
    """A step's time in words, which are equal also where the time is not known."""
    sigma = "" if instant.sigma is None else f", sigma {instant.sigma:g}"
    return f"step {instant.step} at timestep {instant.timestep:g}{sigma}"


def _apart(site: str, what: str, one: object, other: object) -> InvalidInput:
    return InvalidInput(
        f"recording {site}: the runs or batches have different {what} ({one} and {other}); record "
        "them apart"
    )


def _of_one_length(parts: Sequence[Activation]) -> Sequence[Activation]:
    """The parts with as many tokens each, where they say which are padding."""
    axis = parts[0].axes.index("tokens")
    longest = max(each.shape[axis] for each in parts)
    found = []
    for each in parts:
        lacking = longest - each.shape[axis]
        if each.positions is None:
            return parts
        if lacking:
            behind = (0, 0) * (each.tensor.dim() - axis - 1)
            tensor = pad(each.tensor, (*behind, lacking, 0))
            positions = pad(each.positions, (lacking, 0), value=-1)
            each = replace(each, tensor=tensor, positions=positions, tokens=None)
        found.append(each)
    return found


def token_means(site: str, activation: Activation) -> Float[Tensor, "rows steps features"]:
    """Mean over each row's own tokens in float64, padding left out, heads side by side.

    Raises:
        InvalidInput: several branches are recorded, or a row has no token of its own at a step.
    """
    values = one_branch(site, activation)
    padding = activation.padding
    if padding is None:
        return values.double().mean(2)
    real = ~padding.to(values.device)
    counts = real.sum(2)
    if bool((counts == 0).any()):
        row = int((counts == 0).any(1).nonzero()[0])
        raise InvalidInput(f"{site}: row {row} has nothing but padding at one of its steps")
    kept = torch.where(real[..., None], values, 0)  # a product would keep what is not finite
    return kept.double().sum(2) / counts[..., None]


def row_means(activation: Activation) -> Activation:
    """Mean over rows at the same token, step and branch, in float32 or wider, as one row.

    Tokens of a language model are the same where their index among the row's own tokens is; those
    that only some rows have are averaged over these.
    """
    tensor = activation.tensor
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    first = activation.rows[:1]
    positions = activation.positions
    if positions is None or bool((positions == positions[:1]).all()):
        if positions is None or activation.padding is None:
            kept = None if positions is None else positions[:1]
            return replace(
                activation, tensor=wide.mean(0, keepdim=True), rows=first, positions=kept
            )
    means, places = [], []
    for step in range(positions.shape[1]):
        own = positions[:, step].to(wide.device)
        found = own[own >= 0].unique()  # in order
        at = torch.searchsorted(found, own.clamp(min=0)).clamp(max=len(found) - 1)
        real = own >= 0
        total = wide.new_zeros(len(found), *wide.shape[3:])
        total.index_add_(0, at[real], wide[:, step][real])
        counts = torch.bincount(at[real], minlength=len(found)).to(wide.dtype)
        means.append(total / counts.reshape(-1, *(1,) * (total.dim() - 1)))
        places.append(found.cpu())
    count = max(map(len, places))
    out = wide.new_zeros(1, len(means), count, *wide.shape[3:])
    kept = torch.full((1, len(means), count), -1)
    for step, (mean, found) in enumerate(zip(means, places, strict=True)):
        out[0, step, : len(found)], kept[0, step, : len(found)] = mean, found
    return replace(activation, tensor=out, rows=first, positions=kept, tokens=None)


def of_tensor(site: str, values: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """[rows, steps, tokens, features] and the indices of the steps, () where there are none.

    Args:
        site: what the error calls it.
        values: [rows, features], [rows, steps, features] or [rows, steps, tokens, features].

    Raises:
        InvalidInput: the tensor has another shape or is no floating point tensor.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = str(values.dtype) if isinstance(values, Tensor) else type(values).__name__
        raise InvalidInput(f"{site}: floating point values are needed, got {kind}")
    if values.dim() == 2:
        return values[:, None, None], ()
    if values.dim() in (3, 4):
        whole = values if values.dim() == 4 else values[:, :, None]
        return whole, tuple(range(values.shape[1]))
    raise InvalidInput(
        f"{site}: [rows, features], [rows, steps, features] or [rows, steps, tokens, features] is "
        f"needed, got {list(values.shape)}"
    )
