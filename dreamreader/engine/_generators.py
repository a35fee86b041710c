"""The random generators that a run of a pipeline may draw from: the global ones, and private ones.

Private generators are found where a scheduler, a module or the pipeline keeps them: as attributes,
also in lists and dictionaries, or as variables that a method or hook written elsewhere names. One
that lives only inside a function cannot be seen.
"""

import random
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import chain
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dreamreader.errors import InvalidInput

_LIBRARIES = {"torch", "diffusers", "transformers", "numpy", "accelerate", "peft", "dreamreader"}
_DEPTH = 3  # of objects within a scheduler


@dataclass(frozen=True)
class GeneratorSource:
    """One generator: what it is called, and how its state is read, written and seeded."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    seed: Callable[[int], Any]
    own: Any = None  # of a private one, the generator


def global_torch(pipe: Any) -> list[GeneratorSource]:
    """Those of torch: of the CPU and of every CUDA device that is in use or about to be."""
    return [_torch("", each) for each in (torch.default_generator, *_cuda(pipe))]


def global_others() -> list[GeneratorSource]:
    """Those of numpy and of Python; their states are large."""
    return [_legacy("", numpy.random), _python("", random)]


def private(pipe: Any, modules: Mapping[str, nn.Module]) -> list[GeneratorSource]:
    """Generators that the pipeline, its schedulers and its modules keep, by name.

    Raises:
        InvalidInput: one of them draws from the system's entropy, so no seed decides it.
    """
    found: dict[int, GeneratorSource] = {}
    parts = {name: each for name, each in pipe.components.items() if _may_draw(each)}
    seen = {id(each) for each in parts.values()}
    walks = [_attributes("the pipeline", pipe, seen, 1)]
    walks += [_attributes(name, each, seen, _DEPTH) for name, each in parts.items()]
    walks += [_of_module(name, each, seen) for name, each in modules.items()]
    for name, value in chain(*walks):
        if id(value) not in found and (source := _source(name, value)) is not None:
            found[id(value)] = source
    globals_ = {id(torch.default_generator), id(getattr(random, "_inst", None))}
    globals_ |= {id(getattr(numpy.random.mtrand, "_rand", None))}
    return [source for key, source in found.items() if key not in globals_]


def same(one: Any, other: Any) -> bool:
    """Whether two states of a generator are equal."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, numpy.ndarray):
        return numpy.array_equal(one, other)
    if isinstance(one, dict):
        return all(same(value, other[name]) for name, value in one.items())
    return one == other


def _source(name: str, value: Any) -> GeneratorSource | None:
    if isinstance(value, torch.Generator):
        return _torch(f"{name}, a torch.Generator", value)
    if isinstance(value, numpy.random.Generator):
        return _numpy(f"{name}, a numpy Generator", value.bit_generator, value)
    if isinstance(value, numpy.random.RandomState):
        return _legacy(f"{name}, a numpy RandomState", value)
    if isinstance(value, random.SystemRandom):
        raise InvalidInput(
            f"{name} is a {type(value).__name__}, which draws from the system's entropy: no seed "
            "decides the pictures. Give it another generator, or use recording() and editing()"
        )
    return _python(f"{name}, a random.Random", value) if isinstance(value, random.Random) else None


def _torch(name: str, own: torch.Generator) -> GeneratorSource:
    return GeneratorSource(name, own.get_state, own.set_state, own.manual_seed, own)


def _legacy(name: str, own: Any) -> GeneratorSource:
    def seed(number: int) -> None:
        own.seed(number % 2**32)

    return GeneratorSource(name, lambda: own.get_state(legacy=False), own.set_state, seed, own)


def _python(name: str, own: Any) -> GeneratorSource:
    return GeneratorSource(name, own.getstate, own.setstate, own.seed, own)


def _numpy(name: str, bits: Any, own: Any) -> GeneratorSource:
    def write(state: Any) -> None:
        bits.state = state

    def seed(number: int) -> None:
        bits.state = type(bits)(number).state

    return GeneratorSource(name, lambda: bits.state, write, seed, own)


_PLAIN = {type(None), str, int, float, bool, torch.dtype, torch.device, Tensor, nn.Parameter}
_SKIPPED = {"_parameters", "_buffers", "_modules", "_internal_dict", "config"}
_ELSEWHERE = (str, int, float, Tensor, nn.Module, type, torch.dtype, torch.device)
_KINDS = (torch.Generator, numpy.random.Generator, numpy.random.RandomState, random.Random)
_Found = Iterator[tuple[str, Any]]


def _may_draw(part: Any) -> bool:
    """Whether a component is one that is neither a module nor a tokenizer or processor."""
    if part is None or isinstance(part, nn.Module):
        return False
    return all(each.__module__.partition(".")[0] != "transformers" for each in type(part).__mro__)


def _of_module(name: str, module: nn.Module, seen: set[int]) -> _Found:
    for path, each in module.named_modules():
        yield from _attributes(f"{name}.{path}" if path else name, each, seen, 1)


def _attributes(name: str, owner: Any, seen: set[int], depth: int) -> _Found:
    for shelf in (getattr(owner, "__dict__", {}), *map(vars, _foreign(type(owner)))):
        kept = [(key, value) for key, value in shelf.items() if type(value) not in _PLAIN]
        for key, value in kept:
            if key not in _SKIPPED and not _is_empty(value):
                yield from _values(f"{name}.{key}", value, seen, depth)


def _values(name: str, value: Any, seen: set[int], depth: int) -> _Found:
    if isinstance(value, _KINDS):
        yield name, value
    elif isinstance(value, _ELSEWHERE):
        return
    elif isinstance(value, staticmethod | classmethod | partial | types.MethodType):
        inner = getattr(value, "__func__", None) or getattr(value, "func", None)
        yield from _values(name, inner, seen, depth)
    elif isinstance(value, types.FunctionType):
        yield from _of_function(name, value, seen)
    elif isinstance(value, Mapping | list | tuple) and len(value) <= 100 and id(value) not in seen:
        seen.add(id(value))
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            if type(each) not in _PLAIN:
                yield from _values(f"{name}[{key!r}]", each, seen, depth)
    elif hasattr(value, "__dict__") and id(value) not in seen and not _is_library(value, depth):
        seen.add(id(value))
        yield from _attributes(name, value, seen, depth - 1)


def _of_function(name: str, function: types.FunctionType, seen: set[int]) -> _Found:
    """Variables that a function names, of the module around it or of a function around it."""
    if id(function) in seen or not _is_foreign(function.__module__):
        return
    seen.add(id(function))
    around = {each: function.__globals__.get(each) for each in function.__code__.co_names}
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            around[key] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    for key, value in around.items():
        if isinstance(value, (*_KINDS, types.FunctionType, types.MethodType)):
            yield from _values(f"{name} with its variable {key}", value, seen, 0)


@lru_cache(256)
def _foreign(kind: type) -> tuple[type, ...]:
    """The classes that it is made of whose code is none of the libraries'."""
    return tuple(each for each in kind.__mro__ if _is_foreign(each.__module__))


def _is_empty(value: Any) -> bool:
    return type(value) in (dict, OrderedDict, list, tuple, set) and not value


@cache
def _is_foreign(home: str | None) -> bool:
    """Whether code is none of the libraries', whose classes keep what they keep as attributes."""
    return (home or "").partition(".")[0] not in {*_LIBRARIES, "builtins", "functools", "typing"}


def _is_library(value: Any, depth: int) -> bool:
    return depth <= 0 or isinstance(value, types.ModuleType)


def _cuda(pipe: Any) -> list[torch.Generator]:
    """Generators of every CUDA device, where one is in use or is about to be."""
    if not torch.cuda.is_available():
        return []
    device = getattr(pipe, "_execution_device", None) or getattr(pipe, "device", None)
    if not torch.cuda.is_initialized() and getattr(device, "type", None) != "cuda":
        return []
    torch.cuda.init()
    return list(torch.cuda.default_generators)
