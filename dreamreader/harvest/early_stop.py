"""Ends a language model's forward where nothing that is read comes any more."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

from torch import nn


class _EndReached(BaseException):  # which no model takes for an error of its own
    """The block behind the last one that is read was about to run."""


class EarlyStop:
    """Ends forwards before the block that follows all modules that are read.

    Blocks of a list run one after another, but nothing says so: the first forward runs to its end,
    and is watched. Where a module that is read runs behind that block, none is ever ended.

    Args:
        model: which runs. read: modules whose values are wanted.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> EarlyStop(model, [model[0]]).block is None  # the blocks of a model are a ModuleList
        True
    """

    def __init__(self, model: nn.Module, read: Sequence[nn.Module]):
        self.block = _block_behind(model, read)
        self._read = list(dict.fromkeys(read))
        self._in_order: bool | None = None

    @contextmanager
    def around_forward(self) -> Iterator[None]:
        """Ends the forward in this block of code, if an earlier one has shown that it may."""
        if self.block is None or self._in_order is False:
            yield
        elif self._in_order:
            handle = self.block.register_forward_pre_hook(_end_here())
            try:
                yield
            except _EndReached:
                pass
            finally:
                handle.remove()
        else:
            with self._watched(self.block):
                yield

    @contextmanager
    def _watched(self, block: nn.Module) -> Iterator[None]:
        """Sees whether everything that is read has run when the block begins."""
        began, late, here = [], [], get_ident()
        with ExitStack() as stack:
            for module, events in [(block, began), *((each, late) for each in self._read)]:

                def note(*_: Any, events: list[int] = events) -> None:
                    if get_ident() == here and (events is began or began):
                        events.append(1)

                stack.callback(module.register_forward_pre_hook(note).remove)
            yield
        self._in_order = bool(began) and not late


def _end_here() -> Callable[..., None]:
    """A hook that ends forwards of this thread; others of the same model run on."""
    here = get_ident()

    def end(*_: Any) -> None:
        if get_ident() == here:
            raise _EndReached

    return end


def _block_behind(model: nn.Module, read: Sequence[nn.Module]) -> nn.Module | None:
    """What follows the last module that is read in the outermost list that holds them all."""
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList):
            home = {each: n for n, block in enumerate(blocks) for each in block.modules()}
            if read and all(each in home for each in read):
                behind = max(home[each] for each in read) + 1
                return blocks[behind] if behind < len(blocks) else None
    return None
