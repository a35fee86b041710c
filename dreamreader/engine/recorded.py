"""What is fitted to recordings takes them, or tensors in their place, in one layout."""

from jaxtyping import Float
from torch import Tensor

from dreamreader.engine.cache import Activation
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
