"""Sizes that an attention states, and the refusal where they contradict its projections."""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "num_attn_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
WIDTHS = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "dim_head")


class PortsRefused(Exception):
    """The module is no attention whose heads are known; the text says why."""


def part(module: nn.Module, name: str) -> nn.Module | None:
    """A submodule; None where there is none of this name."""
    return module._modules.get(name)  # getattr takes as long as all else here where there is none


def find_stated(module: nn.Module, names: tuple[str, ...], configured: bool = True) -> int | None:
    """The first of these numbers that the module, or else its configuration, states."""
    own = vars(module)
    found = _number(own.get, names)
    config = own.get("config") if configured and found is None else None
    return found if config is None else _number(lambda name: getattr(config, name, None), names)


def _number(look_up: Callable[[str], Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = look_up(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def head_count(module: nn.Module) -> int:
    """Heads of the queries.

    Raises:
        Refused: neither the module nor its configuration states them.
    """
    found = find_stated(module, _HEADS)
    if found is None:
        raise PortsRefused("neither it nor its configuration states a number of heads")
    return found


def key_head_count(module: nn.Module, heads: int) -> int:
    """Heads of the keys and values: fewer than those of the queries in grouped attention."""
    found = find_stated(module, _KEY_HEADS, configured=False)
    groups = find_stated(module, ("num_key_value_groups",), configured=False)
    if found is None and groups is not None:
        return heads // groups
    return found or find_stated(module, _KEY_HEADS) or heads


def head_width(module: nn.Module, projection: Any, heads: int) -> int:
    """Features of one head, as stated; where nothing states them, an equal share of the queries."""
    found = find_stated(module, WIDTHS)
    if found is not None:
        return found
    features = out_features(projection)
    if features is None or features % heads:
        raise PortsRefused(
            f"its queries have {features} features, which {heads} heads cannot share"
        )
    return features // heads


def out_features(projection: nn.Module | None) -> int | None:
    """Features that a linear layer gives, as it states them."""
    return _features(projection, ("out_features", "nf", "outfeatures"))


def in_features(projection: nn.Module | None) -> int | None:
    """Features that a linear layer reads, as it states them."""
    return _features(projection, ("in_features", "nx", "infeatures"))


def _features(projection: nn.Module | None, names: tuple[str, ...]) -> int | None:
    own = {} if projection is None else vars(projection)
    return next((own[name] for name in names if isinstance(own.get(name), int)), None)


def check(name: str, features: int | None, heads: int, width: int, parts: str = "heads") -> None:
    """The projection `name` must have `heads` x `width` features.

    Raises:
        Refused: it has not; the text has the numbers.
    """
    if features == heads * width:
        return
    has = "states no number of" if features is None else f"has {features}"
    raise PortsRefused(
        f"{name} {has} features, where {heads} {parts} of {width} are stated, which is "
        f"{heads * width}"
    )


def check_parts(module: nn.Module, known: set[str]) -> None:
    """Every part of the module must be known: an unknown gate, norm or scale changes the heads.

    Raises:
        Refused: there is another submodule or parameter.
    """
    for name, child in module._modules.items():
        if child is not None and name not in known and not _is_neutral(child):
            raise PortsRefused(
                f"its part {name} ({type(child).__name__}) is none that is known, so what its "
                "projections hold is not known"
            )
    for name, weight in module._parameters.items():
        if weight is not None and name not in known:
            raise PortsRefused(
                f"its parameter {name} is none that is known, so what its projections hold is not "
                "known"
            )


def _is_neutral(child: nn.Module) -> bool:
    """Dropout, softmax and the rotation by position, which has no weights."""
    if isinstance(child, (nn.Dropout, nn.Identity, nn.Softmax)):
        return True
    rotates = "Rotary" in type(child).__name__ or "Rope" in type(child).__name__
    return rotates and next(child.parameters(), None) is None


@cache
def class_that_runs(kind: type[nn.Module], package: str) -> str:
    """Name of the class whose `forward` this class runs, empty if `package` does not define it.

    A subclass with a `forward` of its own is a stranger, whatever it is called.
    """
    owner = next(each for each in kind.__mro__ if "forward" in vars(each))
    return owner.__name__ if owner.__module__.split(".")[0] == package else ""
