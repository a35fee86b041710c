"""The model or pipeline under study: its modules by the names that users know."""

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import nn

from dreamreader._register import native
from dreamreader.engine._pattern import Pattern
from dreamreader.errors import InvalidInput


class _Paths:
    """Where the modules of a tree stand in the list of them all, and what follows from that."""

    def __init__(self, places: dict[str, int], root: int | None):
        self.places, self.root = places, root
        self._around: dict[str, tuple[int, ...]] = {}
        self._matches: dict[str, tuple[str, ...]] = {}

    def around(self, path: str) -> tuple[int, ...]:
        """Of the modules that hold the one at a path, the nearest first."""
        found = self._around.get(path)
        if found is None:
            parts = path.split(".")
            above = (".".join(parts[:stop]) for stop in range(len(parts) - 1, 0, -1))
            held = tuple(self.places[each] for each in above if each in self.places)
            found = held if self.root is None else (*held, self.root)
            self._around[path] = found
        return found

    def matching(self, pattern: Pattern) -> tuple[str, ...]:
        found = self._matches.get(pattern.path)
        if found is None:
            found = tuple(path for path in self.places if pattern.matches(path))
            self._matches[pattern.path] = found
        return found


class Modules(Mapping[str, nn.Module]):
    """Modules by path, as they were when it was asked for.

    Attributes:
        every: each module once, with the wrappers of `torch.compile`.
        marked: those of them that `carriers` gives.
        kinds: their classes.
        root: holds them all, where the subject is one module.
    """

    __slots__ = ("every", "marked", "kinds", "root", "_paths", "_places")

    def __init__(
        self,
        paths: _Paths,
        every: list[nn.Module],
        marked: list[nn.Module],
        kinds: Set[type[nn.Module]],
    ):
        self.every, self.marked, self.kinds = every, marked, kinds
        self.root = None if paths.root is None else every[paths.root]
        self._paths, self._places = paths, paths.places

    def around(self, path: str) -> tuple[nn.Module, ...]:
        """The modules that hold the one at a path, the nearest first."""
        return tuple([self.every[at] for at in self._paths.around(path)])

    def matching(self, pattern: Pattern) -> tuple[str, ...]:
        """The paths that a pattern takes, in the order of the model."""
        return self._paths.matching(pattern)

    def __getitem__(self, path: str) -> nn.Module:
        return self.every[self._places[path]]

    def __contains__(self, path: object) -> bool:
        return path in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Subject:
    """Modules of a diffusers pipeline, a transformers model or any `nn.Module`, by dotted path.

    Paths start at the pipeline's component names or at the model's own attributes. The wrapper of
    `torch.compile` is looked through. `modules()` says what there is at each call, since components
    may be replaced, compiled or given adapters between runs; it walks where anything has changed.

    Attributes:
        kind: `pipeline`, `language` or `module`.
        paused: the hooks of all sessions of this subject do nothing while it is true.
        rehearsing: while it is true edits act, but nothing is recorded, watched or reported: the
            subject is evaluated once more beside the run.
        edited: how often edits have been applied so far.
    """

    def __init__(self, model: Any):
        self.model = model
        self.paused = False
        self.rehearsing = False
        self.edited = 0
        self._tree: _Tree | None = None
        components = getattr(model, "components", None)
        if isinstance(components, dict):
            self.kind = "pipeline"
        elif isinstance(model, nn.Module):
            is_language = hasattr(model, "generate") and hasattr(model, "config")
            self.kind = "language" if is_language else "module"
        else:
            raise InvalidInput(
                "a Reader wraps a diffusers pipeline, a transformers model or an nn.Module, got "
                f"{type(model).__name__}"
            )

    @property
    def name(self) -> str:
        own = getattr(type(self.model), "_dreamreader_own_class", type(self.model))
        return own.__name__

    def components(self) -> dict[str, nn.Module]:
        """The modules at the top: components of a pipeline, or the model under the empty name."""
        return {name: unwrap(each) for name, each in self._tops().items()}

    def _tops(self) -> dict[str, nn.Module]:
        if self.kind != "pipeline":
            return {"": self.model}
        components = self.model.components.items()
        return {name: each for name, each in components if isinstance(each, nn.Module)}

    def modules(self) -> Modules:
        """Every module by path, the root of a plain model left out."""
        tops = self._tops()
        found = None if self._tree is None else self._tree.modules(tops)
        return self._walk(tops) if found is None else found

    def _walk(self, tops: dict[str, nn.Module]) -> Modules:
        number: dict[nn.Module, int] = {}
        found: dict[str, nn.Module] = {}
        root = None
        for top, given in tops.items():
            component = unwrap(given)
            if component is not given:
                for each in parts(given):
                    number.setdefault(each, len(number))
            if not top:
                root = component
            for path, module in named_parts(component, top):
                number.setdefault(module, len(number))
                if name := _bare(path):
                    found[name] = unwrap(module)
        every, places = list(number), {path: number[each] for path, each in found.items()}
        paths = _Paths(places, None if root is None else number[root])
        self._tree = _Tree(tops, every, paths)
        return Modules(paths, every, carriers(every), self._tree.kinds)


class _Tree:
    """What a walk found, without keeping any module alive: it holds while no module has others."""

    def __init__(self, tops: dict[str, nn.Module], every: list[nn.Module], paths: _Paths):
        self.kinds = frozenset(map(type, every))
        self._tops = {name: id(each) for name, each in tops.items()}
        self._paths = paths
        self._look = (_tree_of and _tree_of(every)) or tree_of(every)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the subject walks its own modules

    def modules(self, tops: dict[str, nn.Module]) -> Modules | None:
        """The modules by path; None where a walk would find others."""
        if {name: id(each) for name, each in tops.items()} != self._tops:
            return None
        found = self._look()
        if found is None:
            return None
        return Modules(self._paths, *found, self.kinds)


_Look = Callable[[], tuple[list[nn.Module], list[nn.Module]] | None]
_tree_of: Callable[[list[nn.Module]], _Look | None] | None = getattr(
    native()[0], "module_tree_of", None
)


def tree_of(every: list[nn.Module]) -> _Look:
    """A function that looks again at these modules, each once, all that they hold among them.

    It gives them with those that `carriers` gives, or None where one is gone, holds others, in
    another order or by other names, or is of another class. It keeps none alive.
    """
    refs, kinds = [weakref.ref(each) for each in every], list(map(type, every))
    held = [each._modules for each in every]
    sizes = list(map(len, held))
    holders = [at for at, size in enumerate(sizes) if size]
    inside = _inside([held[at] for at in holders])

    def look() -> tuple[list[nn.Module], list[nn.Module]] | None:
        every: list[Any] = [ref() for ref in refs]
        if list(map(type, every)) != kinds:  # None, of one that is gone, is of no module's class
            return None
        held = [each._modules for each in every]
        if list(map(len, held)) != sizes or _inside([held[at] for at in holders]) != inside:
            return None
        return every, carriers(every)

    return look


def _inside(held: list[dict[str, nn.Module | None]]) -> tuple[list[str], list[int]]:
    """What the modules of these dictionaries are called, and which objects they are."""
    values = chain.from_iterable([each.values() for each in held])
    names = chain.from_iterable([each.keys() for each in held])  # TorchScript's are no iterables
    return list(names), list(map(id, values))


def carriers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those with a mark of torch.compile, a hook of diffusers or gradient checkpointing."""
    return [
        each
        for each in modules
        if "_diffusers_hook" in (own := each.__dict__)
        or "_compiled_call_impl" in own
        or "_gradient_checkpointing_func" in own
        or "_orig_mod" in each._modules
    ]


def named_parts(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """What `named_modules` gives, in its order; a block is entered in a third of its time."""
    found, seen, waiting = [], set(), [(path, module)]
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append((path, module))
        prefix = f"{path}." if path else ""
        inside = [
            (prefix + name, each) for name, each in module._modules.items() if each is not None
        ]
        waiting += reversed(inside)
    return found


def parts(module: nn.Module) -> list[nn.Module]:
    """What `modules` gives, in its order."""
    found: dict[nn.Module, None] = {}
    waiting = [module]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            if module._modules:
                waiting += reversed([each for each in module._modules.values() if each is not None])
    return list(found)


def unwrap(module: Any) -> Any:
    """The module itself where `torch.compile` has wrapped it."""
    while "_orig_mod" in getattr(module, "_modules", ()):  # to ask for what is missing is slow
        module = module._orig_mod
    return module


def innermost(model: nn.Module) -> nn.Module:
    """The model below every wrapper: those of `torch.compile` and of PEFT's adapters."""
    while True:
        inner = unwrap(model)
        if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        if inner is model:
            return inner
        model = inner


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a language model reads the prompt with an encoder of its own.

    The two halves of such a model have its config, but take no inputs of a decoder.
    """
    inner = innermost(model)
    if not getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    return _takes_decoder_inputs(type(inner))


@lru_cache(maxsize=256)
def _takes_decoder_inputs(kind: type) -> bool:
    """Also below a subclass that hands its arguments on."""
    forwards = [vars(each)["forward"] for each in kind.__mro__ if "forward" in vars(each)]
    return any(name.startswith("decoder_") for each in forwards for name in names_of(each))


def names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments that a function takes by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables have no signature
        return ()
    return tuple(each.name for each in parameters if each.kind <= each.POSITIONAL_OR_KEYWORD)


def forward_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments that a class of modules takes by position, itself left out."""
    return _names_of_method(kind.forward)[1:]


_names_of_method = lru_cache(maxsize=512)(names_of)  # of functions of classes, which stay anyway


def input_device(model: nn.Module) -> torch.device:
    """Where a language model's inputs have to be.

    Under accelerate's offload the weights are elsewhere between calls: its hooks say where they go.

    Raises:
        InvalidInput: the weights are on no device.
    """
    inner: Any = innermost(model)
    embeddings = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    for module in (model, inner, embeddings):
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (where := getattr(each, "execution_device", None)) is not None:
                return torch.device(where)
    weight = getattr(embeddings, "weight", None)
    device: torch.device = weight.device if isinstance(weight, torch.Tensor) else inner.device
    if device.type == "meta":
        raise InvalidInput(f"{type(inner).__name__}: its weights are on the meta device: load them")
    return device


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` runs this module, as a wrapper or in place."""
    return (
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
    )


def _bare(path: str) -> str:
    if "_orig_mod" not in path:
        return path
    return ".".join(part for part in path.split(".") if part != "_orig_mod")
