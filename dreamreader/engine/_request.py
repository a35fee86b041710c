"""What recordings and edits have in common: a site, and when and where they apply."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dreamreader._devices import device_of
from dreamreader.engine._axes import parse_axes
from dreamreader.engine._pattern import WHOLE, parse
from dreamreader.engine._selection import (
    describe,
    in_steps,
    in_values,
    normalized,
    normalized_steps,
    normalized_values,
)
from dreamreader.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Request:
    """A site and a selection; the base of `Record` and of every edit.

    Args:
        site: a site string, or several.
        steps: index of denoising steps (decoding positions of a language model): a number, slice,
            range, set or predicate; negative numbers count from the end.
        timesteps, sigmas, fraction: a number, a pair (low, high) with both ends included, a slice
            (end excluded), a set or a predicate of the scheduler's value, noise level, share done.
        branch: guidance branch or branches; all by default.
        tokens: indices, slice, mask (also soft, values 0 to 1, or [H, W] of the picture), a word
            of the prompt or several, or a `Box` in the picture. In a language model indices count
            the row's own tokens, without padding; negative ones count from the prompt's end.
        rows: indices, slice or mask over the rows of the run.
        layout: names of the dimensions of the values at the site, where the module does not tell
            them: `rows`, `tokens`, `heads`, `features`, `height`, `width` or `frames`, such as
            "rows height width features".

    A list, tuple, array or tensor of whole numbers is indices, of truth values a mask.
    """

    site: str | Sequence[str]
    steps: Any = field(default=None, kw_only=True)
    timesteps: Any = field(default=None, kw_only=True)
    sigmas: Any = field(default=None, kw_only=True)
    fraction: Any = field(default=None, kw_only=True)
    branch: str | Sequence[str] | None = field(default=None, kw_only=True)
    tokens: Any = field(default=None, kw_only=True)
    rows: Any = field(default=None, kw_only=True)
    layout: str | None = field(default=None, kw_only=True)

    def __post_init__(self):
        sites = _list_strings(
            self.site, f"{self.label}: site", "a site such as 'unet.mid_block:out'"
        )
        if not sites:
            raise InvalidInput(f"{self.label}: the list of sites is empty")
        for site in sites:
            parse(site)
        if not isinstance(self.site, str):
            object.__setattr__(self, "site", sites)
        if self.branch is not None and not isinstance(self.branch, str):
            branches = _list_strings(self.branch, f"{self.label}: branch", "a name such as 'cond'")
            object.__setattr__(self, "branch", branches)
        self._normalize("steps", normalized_steps)
        for name in ("timesteps", "sigmas", "fraction"):
            self._normalize(name, normalized_values)
        self._normalize("tokens", normalized, soft=True, words=True)
        self._normalize("rows", normalized)
        if self.layout is not None:
            for site in sites:
                if parse(site).port not in WHOLE:
                    raise InvalidInput(
                        f"{self.label}: layout={self.layout!r} has no meaning at {site}: a port of "
                        f"an attention has its own dimensions. It is for {', '.join(WHOLE)}"
                    )
            object.__setattr__(self, "layout", parse_axes(self.layout, self.label))

    def _normalize(self, name: str, form: Callable[..., Any], **allowed: bool) -> None:
        """Bring the selection in a field to one of the forms that are understood everywhere."""
        value = form(getattr(self, name), f"{self.label}: {name}", **allowed)
        object.__setattr__(self, name, value)

    @property
    def label(self) -> str:
        return type(self).__name__

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site,) if isinstance(self.site, str) else tuple(self.site)

    @property
    def branches(self) -> tuple[str, ...] | None:
        return (self.branch,) if isinstance(self.branch, str) else self.branch  # pyright: ignore

    @property
    def needs_time(self) -> bool:
        has_none = self.steps is None and self.timesteps is None
        return not (has_none and self.sigmas is None and self.fraction is None)

    @property
    def is_empty(self) -> bool:
        """Whether the schedule is empty on purpose, such as `steps=[]`."""
        return self.needs_time and (
            any(
                isinstance(each, list | tuple | set | frozenset) and not len(each)
                for each in (self.steps, self.timesteps, self.sigmas, self.fraction)
            )
            or (isinstance(self.steps, Tensor) and not bool(self.steps.any()))
        )

    def runs_at(self, moment: Any, total: int | None) -> bool:
        """Whether the selection holds at a moment (step, timestep, ...) of `total` steps."""
        return (
            in_steps(self.steps, moment.step, total)
            and in_values(self.timesteps, moment.timestep)
            and in_values(self.sigmas, moment.sigma)
            and in_values(self.fraction, moment.fraction)
        )

    def describe(self) -> str:
        """The request in one line, without tensors."""
        parts = [", ".join(self.sites)]
        for name in _SELECTIONS:
            value = getattr(self, name)
            if value is not None:
                parts.append(f"{name}={describe(value)}")
        return f"{self.label}({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(
            same(getattr(self, each.name), getattr(other, each.name)) for each in fields(self)
        )

    def __hash__(self) -> int:
        return hash((type(self), self.sites))


_SELECTIONS = tuple(each.name for each in fields(Request) if each.name != "site")


@dataclass(frozen=True, eq=False)
class Record(Request):
    """A recording: the values at a site, kept in their canonical layout.

    Args:
        dtype: of the stored values; that of the model by default. The model itself is never cast.
        device: where values are stored; None leaves them where they are.
        reduce: applied to each [rows, tokens, features] (heads: [rows, tokens, heads, d_head])
            before it is stored; must keep the number of dimensions. It never sees padding of a
            language model: where there is some, it is called row by row.

    Example:
        >>> Record("unet.mid_block.attentions.0", steps=slice(0, 5), branch="cond").describe()
        "Record(unet.mid_block.attentions.0, steps=slice(0, 5, None), branch='cond')"
    """

    dtype: torch.dtype | None = field(default=None, kw_only=True)
    device: str | torch.device | None = field(default="cpu", kw_only=True)
    reduce: Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        dtype = self.dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InvalidInput(
                f"Record: dtype is a floating point type such as torch.float32, got {dtype!r}"
            )
        if self.device is not None:
            device_of(self.device)
        if self.reduce is not None and not callable(self.reduce):
            raise InvalidInput(
                f"Record: reduce must be a function, got {type(self.reduce).__name__}"
            )


def _list_strings(value: Any, label: str, kind: str) -> tuple[str, ...]:
    """One string or several as a tuple.

    Raises:
        InvalidInput: they are no strings.
    """
    several = not isinstance(value, str | bytes | Mapping) and isinstance(value, Iterable)
    listed: tuple[Any, ...] = tuple(value) if several else (value,)
    for each in listed:
        if not isinstance(each, str):
            raise InvalidInput(f"{label}: {kind} is needed, or several, got {each!r}")
    return listed


def same(a: Any, b: Any) -> bool:
    """Equality that compares tensors by value, dtype and shape, and looks into containers."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.detach().cpu(), b.detach().cpu())
        )
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if is_dataclass(a) and type(a) is type(b) and not isinstance(a, Request):
        return all(same(getattr(a, each.name), getattr(b, each.name)) for each in fields(a))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return bool(a == b)
