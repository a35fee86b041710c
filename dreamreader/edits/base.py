"""What the edits share: heads and channels, and checks of their inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from dreamreader.engine import EditRequest, join, normalized, parse
from dreamreader.errors import InvalidInput, UnknownName

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ChannelEdit(EditRequest):
    """An edit that may be limited to heads or channels.

    Args:
        heads: indices of heads, at the ports q, k, v and heads.
        channels: indices or bool mask of the features.
    """

    heads: Any = field(default=None, kw_only=True)
    channels: Any = field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        self._normalize("heads", normalized)
        self._normalize("channels", normalized)


def check_finite(name: str, value: Any) -> None:
    """Refuse NaN and infinity.

    Raises:
        InvalidInput: some value is not finite, or it is no number.
    """
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name} must be numbers, got {value!r}") from error
    if tensor.numel() == 0:
        raise InvalidInput(f"{name} is empty")
    if not bool(tensor.detach().isfinite().all()):
        bad = tensor.detach().flatten()
        where = (~bad.isfinite()).nonzero().flatten().tolist()
        raise InvalidInput(
            f"{name} has {len(where)} of {bad.numel()} values that are not finite, the first at "
            f"{where[0]}"
        )


def row_length(name: str, value: Any) -> dict[str, int]:
    """{name: length} where a value is given for each row, else nothing."""
    if isinstance(value, Tensor):
        return {name: value.numel()} if value.dim() and value.numel() > 1 else {}
    return {name: len(value)} if isinstance(value, list | tuple) and len(value) > 1 else {}


def per_site(value: T | Mapping[str, T], site: str, name: str) -> T:
    """The entry for a site of a mapping from site names, or the one value for all.

    Raises:
        UnknownName: the mapping has no entry for the site.
    """
    if not isinstance(value, Mapping):
        return value
    canonical = {_canonical(key): entry for key, entry in value.items()}
    if site not in canonical:
        raise UnknownName(f"{name} for site", site, canonical)
    return canonical[site]


def _canonical(site: str) -> str:
    pattern = parse(site)
    return join(pattern.path, pattern.port, pattern.stream)
