"""Whose call a hook sees: the session's own thread's, or another's of the same model."""

import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

GENERATORS = threading.RLock()  # held by whoever seeds or watches the global ones for a run
_get_ident = threading.get_ident
_WORKERS = "torch.nn.parallel.parallel_apply"


class Owner:
    """The thread that opens a session, with those that torch starts for its calls.

    Threads of torch are the workers of `parallel_apply` (replicas) and the device threads of
    autograd, which run recomputation under gradient checkpointing.
    """

    __slots__ = ("ident",)

    def __init__(self) -> None:
        self.ident = threading.get_ident()

    def here(self) -> bool:
        """Whether the running thread is one of these."""
        return _get_ident() == self.ident or _is_of_torch()

    def only(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function, doing nothing where another thread calls it."""

        def call(*args: Any, **kwargs: Any) -> None:
            if self.here():
                function(*args, **kwargs)

        return call


def _is_of_torch() -> bool:
    thread = threading.current_thread()
    if isinstance(thread, threading._DummyThread):
        return torch._C._current_graph_task_id() != -1
    target = getattr(thread, "_target", None)  # a module of torch.nn is a user's target
    return isinstance(target, FunctionType) and target.__module__ == _WORKERS
