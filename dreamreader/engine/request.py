"""What recordings and edits have in common: a site, and when and where they apply."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dreamreader.engine.pattern import parse
from dreamreader.errors import InvalidInput

if TYPE_CHECKING:
    from dreamreader.engine.place import Place
    from dreamreader.engine.probs import Attention
    from dreamreader.engine.stream import Flowing
    from dreamreader.engine.watch import Call
    from dreamreader.ops import Instruction

Steps = int | slice | range | Iterable[int] | Callable[[int], bool] | None
Values = float | tuple[float, float] | slice | Iterable[float] | Callable[[float], bool] | None


@dataclass(frozen=True)
class Box:
    """A rectangle of the picture as a token selection, in shares of width and height.

    Args:
        left, top, right, bottom: from 0 (left or top edge) to 1; a token is selected where its
            centre lies inside.
    """

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self):
        if not (0 <= self.left < self.right <= 1 and 0 <= self.top < self.bottom <= 1):
            raise InvalidInput(
                f"{self}: needs 0 <= left < right <= 1 and 0 <= top < bottom <= 1 (shares of width "
                "and height)"
            )

    def mask(self, height: int, width: int) -> Tensor:
        """[height * width] bool."""
        y = (torch.arange(height) + 0.5) / height
        x = (torch.arange(width) + 0.5) / width
        rows = (y >= self.top) & (y < self.bottom)
        columns = (x >= self.left) & (x < self.right)
        return (rows[:, None] & columns[None, :]).flatten()


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
            of the prompt, or a `Box` in the picture.
        rows: indices, slice or mask over the rows of the run.
    """

    site: str | Sequence[str]
    steps: Any = field(default=None, kw_only=True)
    timesteps: Any = field(default=None, kw_only=True)
    sigmas: Any = field(default=None, kw_only=True)
    fraction: Any = field(default=None, kw_only=True)
    branch: str | Sequence[str] | None = field(default=None, kw_only=True)
    tokens: Any = field(default=None, kw_only=True)
    rows: Any = field(default=None, kw_only=True)

    def __post_init__(self):
        sites = (self.site,) if isinstance(self.site, str) else tuple(self.site)
        if not sites:
            raise InvalidInput(f"{self.label}: the list of sites is empty")
        for site in sites:
            parse(site)
        if not isinstance(self.site, str):
            object.__setattr__(self, "site", sites)
        if self.branch is not None and not isinstance(self.branch, str):
            object.__setattr__(self, "branch", tuple(self.branch))
        for name in ("steps", "timesteps", "sigmas", "fraction"):
            _check_selector(self, name, getattr(self, name))

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
        return any(
            each is not None for each in (self.steps, self.timesteps, self.sigmas, self.fraction)
        )

    @property
    def is_empty(self) -> bool:
        """Whether the schedule is empty on purpose, such as `steps=[]`."""
        return any(
            isinstance(each, list | tuple | set | frozenset | range) and not len(each)
            for each in (self.steps, self.timesteps, self.sigmas, self.fraction)
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
        for each in fields(Request)[1:]:
            value = getattr(self, each.name)
            if value is not None:
                shown = f"mask {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                parts.append(f"{each.name}={shown}")
        return f"{self.label}({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(
            same(getattr(self, each.name), getattr(other, each.name)) for each in fields(self)
        )

    def __hash__(self) -> int:
        return hash((type(self), self.sites))


@dataclass(frozen=True, eq=False)
class Record(Request):
    """A recording: the values at a site, kept in their canonical layout.

    Args:
        dtype: of the stored values; that of the model by default. The model itself is never cast.
        device: where values are stored; None leaves them where they are.
        reduce: applied to each [rows, tokens, features] (heads: [rows, tokens, heads, d_head])
            before it is stored; must keep the number of dimensions.

    Example:
        >>> Record("unet.mid_block.attentions.0", steps=slice(0, 5), branch="cond").describe()
        "Record(unet.mid_block.attentions.0, steps=slice(0, 5, None), branch='cond')"
    """

    dtype: torch.dtype | None = field(default=None, kw_only=True)
    device: str | torch.device | None = field(default="cpu", kw_only=True)
    reduce: Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class Watch(Request):
    """A reader of attentions while they run; the engine itself stores nothing of them.

    Args:
        site: sites with the port `probs`.
        saw: called as `saw(attention, call)` wherever the selection holds. `attention` has the
            batch entries of the selection only, `call` says which they are. Where the model forms
            its attention in shares (attention slicing) it is called with each share.

    Raises:
        InvalidInput: a site has another port, or `tokens` is given: the whole sequence is seen.

    Example:
        >>> seen = []
        >>> Watch("unet.**.attn2:probs", lambda attention, call: seen.append(attention.shape))
        Watch(unet.**.attn2:probs)
    """

    saw: "Callable[[Attention, Call], None]"

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.saw):
            raise InvalidInput(f"Watch: saw must be a function, got {type(self.saw).__name__}")
        if self.tokens is not None:
            raise InvalidInput("Watch: tokens has no meaning here, the whole attention is seen")
        for site in self.sites:
            if parse(site).port != "probs":
                raise InvalidInput(f"Watch: {site} is no attention; name its probs: {site}:probs")

    def __repr__(self) -> str:
        return self.describe()


@dataclass(frozen=True, eq=False)
class Stream(Request):
    """A reader of activations while the model runs; the engine keeps and copies nothing of them.

    Args:
        site: sites with any port but `probs`.
        keep: called as `keep(flowing)` wherever the selection holds, after the edits. It has to
            copy what it wants before it returns: the values are the model's own memory.

    Raises:
        InvalidInput: `keep` is no function, or a site has the port `probs`.

    Example:
        >>> norms = []
        >>> Stream("unet.mid_block", lambda flowing: norms.append(flowing.x.norm()), branch="cond")
        Stream(unet.mid_block, branch='cond')
    """

    keep: "Callable[[Flowing], None]"

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.keep):
            raise InvalidInput(f"Stream: keep must be a function, got {type(self.keep).__name__}")
        for site in self.sites:
            if parse(site).port == "probs":
                raise InvalidInput(
                    f"Stream: {site} are attention probabilities, which no model holds in memory; "
                    "use Watch or Record for them"
                )

    def __repr__(self) -> str:
        return self.describe()


@dataclass(frozen=True, eq=False)
class EditRequest(Request):
    """An edit: knows its change as instructions for the kernel, or as a function of the tensor.

    Subclasses give `instructions` or set `is_function` and give `apply`.
    """

    is_function = False

    @property
    def changes_with_step(self) -> bool:
        """Whether the instructions themselves, not only the selection, differ from step to step."""
        return False

    @property
    def keeps_norm(self) -> bool:
        """Whether it restores the norm that a row had before this edit."""
        return False

    @property
    def selects(self) -> bool:
        """Whether `apply` itself leaves what is not selected, bit for bit."""
        return False

    def touched(self, place: "Place") -> Tensor:
        """Where a function acts: not 0 in a tensor that broadcasts to [batch, tokens]."""
        return place.selected

    def row_lengths(self) -> dict[str, int]:
        """Length of every per-row argument."""
        return {}

    def check(self, place: "Place") -> None:
        """Refuse inputs that do not fit the site; called once per site, before the first change."""

    def instructions(self, place: "Place") -> "list[Instruction]":
        raise NotImplementedError

    def apply(self, x: Tensor, place: "Place") -> Tensor:
        raise NotImplementedError


def in_steps(chosen: Any, step: int, total: int | None) -> bool:
    """Whether a step index is in a selection; `total` resolves negative indices and open slices."""
    if chosen is None:
        return True
    if callable(chosen):
        return bool(chosen(step))
    if isinstance(chosen, slice):
        if total is None and any((each or 0) < 0 for each in (chosen.start, chosen.stop)):
            raise InvalidInput(f"steps={chosen}: negative indices need a known number of steps")
        return step in range(*chosen.indices(total if total is not None else step + 1))
    wanted = [chosen] if isinstance(chosen, int) else list(chosen)
    if total is not None:
        wanted = [each + total if each < 0 else each for each in wanted]
    return step in wanted


def in_values(chosen: Any, value: float | None) -> bool:
    """Whether a timestep, sigma or fraction is in a selection."""
    if chosen is None:
        return True
    if value is None or math.isnan(value):
        return False
    if callable(chosen):
        return bool(chosen(value))
    if isinstance(chosen, slice):
        return (chosen.start is None or value >= chosen.start) and (
            chosen.stop is None or value < chosen.stop
        )
    if isinstance(chosen, tuple) and len(chosen) == 2:
        return chosen[0] <= value <= chosen[1]
    wanted = [chosen] if isinstance(chosen, int | float) else list(chosen)
    return any(math.isclose(value, each, rel_tol=1e-6, abs_tol=1e-9) for each in wanted)


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


def _check_selector(request: Request, name: str, value: Any) -> None:
    if value is None or callable(value) or isinstance(value, slice | range):
        return
    wanted = int if name == "steps" else (int, float)
    values = [value] if isinstance(value, int | float) else value
    if isinstance(values, list | tuple | set | frozenset) and all(
        isinstance(each, wanted) and not isinstance(each, bool) for each in values
    ):
        return
    kinds = "a number, slice, range, set or predicate"
    raise InvalidInput(f"{request.label}: {name} must be {kinds}, got {value!r}")
