"""Which entry of a tensor is which row's own token at which decoding step, kept by hand.

A `Layout` knows the padded batch and the calls that a model gets; everything is counted from there,
nothing is read from the model. `Taps` notes what modules gave, `pushed` changes it, both with plain
hooks of torch.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One call of the model: its decoding step, and the columns of the batch that come in."""

    step: int
    columns: range


@dataclass(frozen=True)
class Selection:
    """What a request chooses: own tokens of a row, decoding steps, rows; None is all of them."""

    tokens: Any = None
    steps: Any = None
    rows: Sequence[int] | None = None

    def has(self, own: int, prompt: int, step: int, row: int) -> bool:
        """Whether it holds for a token with number `own` of a row whose prompt has `prompt`."""
        if self.rows is not None and row not in self.rows:
            return False
        steps = [self.steps] if isinstance(self.steps, int) else self.steps
        if steps is not None and step not in steps:
            return False
        if self.tokens is None:
            return True
        if isinstance(self.tokens, slice):  # with a start and a stop that are not negative
            return own in range(self.tokens.start, self.tokens.stop)
        chosen = [self.tokens] if isinstance(self.tokens, int) else self.tokens
        return own in [each + prompt if each < 0 else each for each in chosen]


@dataclass(frozen=True)
class Layout:
    """A batch of prompts, padded to `width` on one side, and the calls that read it.

    Args:
        lengths: own tokens of each prompt.
        width: of the padded prompts.
        side: where the padding is, `left` or `right`.
        calls: of the model, in order.
        beams: entries of the batch for each row, side by side.
    """

    lengths: tuple[int, ...]
    width: int
    side: str
    calls: tuple[Call, ...]
    beams: int = 1

    @property
    def entries(self) -> int:
        return len(self.lengths) * self.beams

    def count(self, chosen: Selection) -> int:
        """How many entries a selection chooses from."""
        return self.entries if chosen.rows is None else len(chosen.rows) * self.beams

    def own(self, row: int, column: int) -> int | None:
        """Number of a column among the row's own tokens, None where it is padding."""
        if self.side == "right":
            return column if column < self.lengths[row] else None
        number = column - (self.width - self.lengths[row])
        return number if number >= 0 else None

    def hits(self, chosen: Selection, call: Call, columns: range) -> list[tuple[int, list[int]]]:
        """(entry, places among `columns`) of what a selection chooses in a call."""
        found = []
        for entry in range(self.entries):
            row = entry // self.beams
            places = [
                place
                for place, column in enumerate(columns)
                if (own := self.own(row, column)) is not None
                and chosen.has(own, self.lengths[row], call.step, row)
            ]
            if places:
                found.append((entry, places))
        return found

    def seen(self, x: Tensor, call: Call, last: bool = False) -> tuple[Tensor, range] | None:
        """`x` as [entries, tokens, ...] without a copy, and its columns; None for other shapes.

        Args:
            last: the module may get the last columns of the call alone, as the head does.
        """
        batch, count = self.entries, len(call.columns)
        if x.dim() == 2 and x.shape[0] == batch * count:
            return x.view(batch, count, -1), call.columns
        if x.dim() < 3 or x.shape[0] != batch:
            return None
        if x.dim() == 4 and x.shape[2] == count != x.shape[1]:
            return x.transpose(1, 2), call.columns  # heads before tokens
        if x.shape[1] == count and (x.dim() == 3 or x.shape[2] != count):
            return x, call.columns
        if last and x.shape[1] < count:
            return x, call.columns[count - x.shape[1] :]
        return None


@dataclass
class Taps:
    """What modules gave, call by call."""

    found: dict[str, list[Tensor]] = field(default_factory=dict)

    @contextmanager
    def on(self, modules: Mapping[str, nn.Module], inputs: Container[str] = ()) -> Iterator["Taps"]:
        """Note what these modules give, and of `inputs` what they get."""
        with ExitStack() as stack:
            for name, module in modules.items():
                self.found[name] = []
                if name in inputs:
                    handle = module.register_forward_pre_hook(self._before(name))
                else:
                    handle = module.register_forward_hook(self._after(name))
                stack.callback(handle.remove)
            yield self

    def _after(self, name: str) -> Callable[..., None]:
        return lambda module, args, output: self._keep(name, first_tensor(output))

    def _before(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._keep(name, first_tensor(args))

    def _keep(self, name: str, x: Tensor | None) -> None:
        if x is not None:
            self.found[name].append(x.detach().clone())


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of a module's result."""
    if isinstance(output, Tensor):
        return output
    for each in output.values() if isinstance(output, Mapping) else output:
        if isinstance(each, Tensor):
            return each
    return None


@contextmanager
def pushed(
    module: nn.Module, vector: Tensor, chosen: Selection, layout: Layout, last: bool = False
) -> Iterator[None]:
    """Add `vector` [D] to the chosen entries of what a module gives."""
    calls = iter(layout.calls)

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        call = next(calls)
        given = first_tensor(output)
        assert given is not None
        changed = given.clone()
        seen = layout.seen(changed, call, last)
        assert seen is not None
        x, columns = seen
        for entry, places in layout.hits(chosen, call, columns):
            x[entry, places] += vector
        if isinstance(output, Tensor):
            return changed
        if isinstance(output, tuple | list):
            at = next(n for n, each in enumerate(output) if each is given)
            return type(output)((*output[:at], changed, *output[at + 1 :]))
        name = next(key for key, each in output.items() if each is given)
        output[name] = changed
        return output

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
