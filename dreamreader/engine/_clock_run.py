"""Learning when a pipeline runs, what it was called with, and what it announces.

Three listeners, each installed for the length of a context manager and removed with it:
`PipelineListener` sees the pipeline's call and its `encode_prompt`; `context_listener` sees the
`cache_context` names; `call_listener` sees the calls of one module. None of them changes a value.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from dreamreader.engine._clock_callbacks import CallbackListener, with_marks
from dreamreader.engine._subject import innermost
from dreamreader.engine._threads import Owner


class RunListener(CallbackListener, Protocol):
    """What wants to know about a pipeline's runs."""

    def run_began(self, arguments: Mapping[str, Any]) -> None:
        """The pipeline was called; `arguments` has its defaults filled in."""

    def run_ended(self, failed: bool) -> None:
        """The call returned, or left with an exception."""

    def encoding_began(self, arguments: Mapping[str, Any]) -> None:
        """`encode_prompt` was called."""

    def encoding_ended(self, result: Any) -> None:
        """`encode_prompt` returned this; None where it left with an exception."""


def bind_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Arguments of a call by name, with defaults; empty when they do not fit the signature."""
    signature = inspect.signature(function)
    try:
        call = signature.bind(*args, **kwargs)
    except TypeError:
        return {}  # the call itself will raise, with a better message
    call.apply_defaults()
    found = dict(call.arguments)
    for name, each in signature.parameters.items():
        if each.kind is inspect.Parameter.VAR_KEYWORD:  # all that modular pipelines have
            found |= found.pop(name)
    return found


def own_class(pipe: Any) -> type:
    """The pipeline's class without the listening one that `listen_to_pipeline` slips in."""
    return getattr(type(pipe), "_dreamreader_own_class", type(pipe))


def other_caller(pipe: Any) -> str | None:
    """The class of the pipeline whose `__call__` is running innermost; None where it is `pipe`.

    Pipelines that are parts of this one (of a prior and a decoder in one) count as itself. Only the
    call stack tells who calls a denoiser that several pipelines share.
    """
    from diffusers import DiffusionPipeline, ModularPipeline

    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_argcount:
            owner = frame.f_locals.get(code.co_varnames[0])
            if isinstance(owner, DiffusionPipeline | ModularPipeline):
                own = owner is pipe or any(owner is part for part in vars(pipe).values())
                return None if own else own_class(owner).__name__
        frame = frame.f_back
    return None


@contextmanager
def listen_to_pipeline(pipe: Any, listener: RunListener) -> Iterator[None]:
    """Tell `listener` about every call of this one pipeline object by this thread.

    Calling an object looks `__call__` up in its class, so for this time the object gets a class
    that derives from its own under the same name. The pipeline's class itself is not touched, and
    other objects of it are not seen.
    """
    if "_dreamreader_listeners" not in vars(type(pipe)):
        object.__setattr__(pipe, "__class__", _listening_class(type(pipe)))
    listeners: list[tuple[RunListener, Owner]] = type(pipe)._dreamreader_listeners
    listening = (listener, Owner())
    listeners.append(listening)
    try:
        yield
    finally:
        listeners.remove(listening)
        if not listeners and "_dreamreader_listeners" in vars(type(pipe)):
            object.__setattr__(pipe, "__class__", own_class(pipe))


def _listening_class(own: type) -> type:
    listeners: list[tuple[RunListener, Owner]] = []

    def find_listeners() -> list[RunListener]:
        return [listener for listener, owner in listeners if owner.here()]

    @functools.wraps(own.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # `other_caller` knows the name
        arguments = bind_call(own.__call__, self, *args, **kwargs)
        heard = find_listeners()
        for listener in heard:
            listener.run_began(arguments)
        placed, named = with_marks(own.__call__, args, kwargs, heard)
        failed = True
        try:
            result = own.__call__(self, *placed, **named)
            failed = False
        finally:
            for listener in reversed(heard):
                listener.run_ended(failed)
        return result

    body: dict[str, Any] = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "__call__": __call__,
        "_dreamreader_listeners": listeners,
        "_dreamreader_own_class": own,
    }
    original = getattr(own, "encode_prompt", None)
    if original is not None:

        @functools.wraps(original)
        def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
            arguments = bind_call(original, self, *args, **kwargs)
            heard = find_listeners()
            for listener in heard:
                listener.encoding_began(arguments)
            result = None
            try:
                result = original(self, *args, **kwargs)
            finally:
                for listener in reversed(heard):
                    listener.encoding_ended(result)
            return result

        body["encode_prompt"] = encode_prompt
    return type(own.__name__, (own,), body)


class _ContextTap:
    """Stands for a denoiser's `cache_context` and passes the names on to whoever listens."""

    def __init__(self, original: Callable[..., Any], earlier: Any):
        self.original = original
        self.earlier = earlier  # what the object itself had there, beside its class
        self.listening: list[tuple[list[str], Owner]] = []

    @contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        heard = [names for names, owner in self.listening if owner.here()]
        for names in heard:
            names.append(name)
        try:
            with self.original(name, *args, **kwargs) as value:
                yield value
        finally:
            for names in heard:
                if names:  # emptied when another run has begun meanwhile
                    names.pop()


@contextmanager
def listen_to_context(module: nn.Module, names: list[str]) -> Iterator[None]:
    """Keep the names of this denoiser's entered `cache_context`s in `names`, innermost last."""
    target = innermost(module)
    original = getattr(target, "cache_context", None)
    if original is None:
        yield
        return

    shelf = vars(target)
    tap = shelf.get("cache_context")
    if not isinstance(tap, _ContextTap):
        tap = shelf["cache_context"] = _ContextTap(original, tap)
    tap.listening.append((names, Owner()))
    try:
        yield
    finally:
        # by identity: two empty lists are equal
        tap.listening[:] = [other for other in tap.listening if other[0] is not names]
        if not tap.listening and shelf.get("cache_context") is tap:
            del shelf["cache_context"]
            if tap.earlier is not None:
                shelf["cache_context"] = tap.earlier


@contextmanager
def listen_to_calls(
    module: nn.Module,
    began: Callable[[tuple[Any, ...], dict[str, Any]], None],
    ended: Callable[[], None],
) -> Iterator[None]:
    """Tell when this module is called and when that call is over, also by an exception.

    `began` runs before other hooks of the module and `ended` after them, so that hooks on the
    module itself find the call still running. Calls by other threads are not told.
    """
    owner = Owner()
    began, ended = owner.only(began), owner.only(ended)
    if getattr(module, "_compiled_call_impl", None) is not None:
        with _listen_to_compiled(module, began, ended):
            yield
        return

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # hooks registered since then stand behind ours; ours has to be the last one again
        hooks = module._forward_hooks
        hooks[last.id] = hooks.pop(last.id)
        began(args, kwargs)

    first = module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    last = module.register_forward_hook(lambda *_: ended(), always_call=True)
    try:
        yield
    finally:
        first.remove()
        last.remove()


@contextmanager
def _listen_to_compiled(
    module: nn.Module,
    began: Callable[[tuple[Any, ...], dict[str, Any]], None],
    ended: Callable[[], None],
) -> Iterator[None]:
    # after module.compile() hooks belong to the compiled graph, which ignores those added later;
    # the compiled callable itself is an attribute that the module looks up at every call
    compiled: Any = module._compiled_call_impl

    def listening(*args: Any, **kwargs: Any) -> Any:
        began(args, kwargs)
        try:
            return compiled(*args, **kwargs)
        finally:
            ended()

    module._compiled_call_impl = listening
    try:
        yield
    finally:
        if module._compiled_call_impl is listening:
            module._compiled_call_impl = compiled


class Parameters:
    """Reads arguments of a module's call by name, however they were passed."""

    def __init__(self, module: nn.Module):
        # the class's forward: offloading and caching put wrappers on the object
        names = list(inspect.signature(type(innermost(module)).forward).parameters)[1:]
        self.positions = {name: place for place, name in enumerate(names)}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return {**dict(zip(self.positions, args, strict=False)), **kwargs}

    def first_of(self, names: tuple[str, ...]) -> str | None:
        """The first of these names that the module has as a parameter."""
        return next((name for name in names if name in self.positions), None)

    def get(self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument, or None when it was not given."""
        if name is None:
            return None
        if name in kwargs:
            return kwargs[name]
        place = self.positions[name]
        return args[place] if place < len(args) else None
