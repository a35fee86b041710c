"""Blocks of a reader: context managers that say what to do where one is entered again."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from functools import partial, wraps
from typing import Any, Generic, ParamSpec, TypeVar

from dreamreader.errors import InvalidInput

_P = ParamSpec("_P")
_T = TypeVar("_T")


class SingleUse(ContextDecorator, AbstractContextManager, Generic[_T]):
    """A context manager for one `with`.

    Args:
        opened: makes what it enters. name: of the method that made it.
    """

    def __init__(self, opened: Callable[[], AbstractContextManager[_T]], name: str):
        self._opened, self._name = opened, name
        self._block: AbstractContextManager[_T] | None = None

    def __enter__(self) -> _T:
        if self._block is not None:
            raise InvalidInput(
                f"this block of {self._name} was entered before, and serves one `with`; call "
                f"reader.{self._name}(...) again for the next"
            )
        self._block = self._opened()
        return self._block.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        if self._block is None:
            raise InvalidInput(f"this block of {self._name} was never entered: use it in a `with`")
        return self._block.__exit__(*error)

    def _recreate_cm(self) -> "SingleUse[_T]":
        """Of a decorated function: a block for each of its calls."""
        return SingleUse(self._opened, self._name)


def single_use(function: Callable[_P, Iterator[_T]]) -> Callable[_P, SingleUse[_T]]:
    """As `contextmanager`, with an error of our own where a block is entered twice."""
    opened = contextmanager(function)

    @wraps(function)
    def block(*args: _P.args, **kwargs: _P.kwargs) -> SingleUse[_T]:
        return SingleUse(partial(opened, *args, **kwargs), function.__name__)

    return block
