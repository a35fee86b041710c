"""Declares operators: one call of `register` per operator and schema, one owner per dispatch key.

    CPU     C++ kernel (`dreamreader._C`), else reference
    CUDA    CUDA kernel (`dreamreader._C`), else Triton kernel, else reference
    other   reference

`DREAMREADER_BACKEND=reference|triton|native` narrows the choice to that back end and the reference.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from dreamreader import _guards
from dreamreader.errors import BrokenExtension, InvalidInput

LIBRARY = torch.library.Library("dreamreader", "DEF")
BACKENDS = ("reference", "triton", "native")


@dataclass(frozen=True)
class Active:
    """Which back end runs an operator for one dispatch key, and why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Kernel:
    """An implementation that may be absent: `needs` names the `_C` symbol or the Triton module."""

    needs: str
    call: Callable


active: dict[str, dict[str, Active]] = {}


@cache
def native() -> tuple[ModuleType | None, str]:
    """The native module or None, and the reason.

    Raises:
        BrokenExtension: the module is installed but cannot be loaded.
    """
    if find_spec("dreamreader._C") is None:
        return None, "the native module is not installed for this Python"
    try:
        module = importlib.import_module("dreamreader._C")
    except ImportError as error:
        raise BrokenExtension(
            f"dreamreader._C is installed but does not load: {error}. Reinstall dreamreader, "
            "or install it with DREAMREADER_EXT=off to run without the native module."
        ) from error
    return module, f"built {module.build_info()['compiled']}"


def chosen_backend() -> str | None:
    """The value of DREAMREADER_BACKEND, checked."""
    choice = os.environ.get("DREAMREADER_BACKEND") or None
    if choice not in (None, *BACKENDS):
        raise InvalidInput(
            f"DREAMREADER_BACKEND={choice!r}: use one of {', '.join(BACKENDS)}, or unset it"
        )
    return choice


def register(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    cpu: Kernel | None = None,
    cuda: Kernel | None = None,
    triton: Kernel | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    twice: Callable | None = None,
) -> Callable:
    """Declares `torch.ops.dreamreader.<name>` and returns its overload.

    What no kernel could know of is refused or undone here, for all of them: see `_guards`.

    Args:
        name: operator name.
        schema: argument list and result, as `torch.library.Library.define` reads it.
        reference: plain torch, any device.
        fake: shapes, dtypes and strides of the results, no data.
        cpu, cuda, triton: kernels that may be absent.
        setup_context, backward: the gradient, as `torch.library.register_autograd` takes it.
        twice: the same gradient in torch code that autograd can follow, where it is to be
            differentiated again; it may return NotImplemented. Without it, that is refused.
    """
    LIBRARY.define(name + schema)
    qualified = f"dreamreader::{name}"
    op = getattr(torch.ops.dreamreader, name).default
    rest = Active("reference", "no kernel for other devices")
    owners = {
        "CPU": _choose((cpu, "native")),
        "CUDA": _choose((cuda, "native"), (triton, "triton"), reference=reference),
    }
    calls = {key: call for key, (_, call) in owners.items() if call is not None}
    for key, call in {"CompositeExplicitAutograd": reference, **calls}.items():
        LIBRARY.impl(name, _guards.guard_kernel(op, call, backward is not None), key)
    _guards.guard_dispatch(LIBRARY, op)
    active[name] = {key: owner for key, (owner, _) in owners.items()} | {"other": rest}
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        gradient = _guards.guard_backward(name, backward, twice)
        torch.library.register_autograd(
            qualified, gradient, setup_context=setup_context, lib=LIBRARY
        )
    return op


def why_not_on(device: int) -> str:
    """Why the native kernels do not run on the CUDA device of this number; empty where they do."""
    module, reason = native()
    ask = getattr(module, "why_not_on", None)
    return reason if ask is None else ask(device)


def _choose(
    *candidates: tuple[Kernel | None, str], reference: Callable | None = None
) -> tuple[Active, Callable | None]:
    """The first back end that is there; `reference`: what may replace a native kernel in a call."""
    choice = chosen_backend()
    reasons: list[str] = []
    there: list[tuple[Active, Callable]] = []
    for kernel, backend in candidates:
        if kernel is None:
            reasons.append(f"{backend}: not written")
        elif choice not in (None, backend):
            reasons.append(f"{backend}: DREAMREADER_BACKEND={choice}")
        else:
            found, reason = _available(kernel.needs, backend)
            if found:
                there.append((Active(backend, "; ".join([reason, *reasons])), kernel.call))
            else:
                reasons.append(f"{backend}: {reason}")
    if not there:
        return Active("reference", "; ".join(reasons)), None
    owner, call = there[0]
    if owner.backend == "native" and reference is not None:
        call = _or_others(call, there[1][1] if there[1:] else reference, reference)
    return owner, call


_without_code: set[int] = set()  # devices for which the native module has none


def _or_others(call: Callable, other: Callable, reference: Callable) -> Callable:
    """`call`; `other` on devices without code for it, `reference` for sizes that it leaves."""
    module: Any = native()[0]

    def run(*arguments):
        if _without_code and _device_of(arguments) in _without_code:
            return other(*arguments)
        try:
            return call(*arguments)
        except module.NotTaken:
            return reference(*arguments)
        except module.NoCode:
            _without_code.add(_device_of(arguments))
            return other(*arguments)

    return run


def _device_of(arguments: tuple) -> int:
    return next(each.get_device() for each in arguments if isinstance(each, torch.Tensor))


def _available(needs: str, backend: str) -> tuple[bool, str]:
    if backend == "native":
        module, reason = native()
        if module is None or hasattr(module, needs):
            return module is not None, reason
        return False, f"{reason}, without {needs}"
    if torch.version.cuda is None and torch.version.hip is None:
        return False, "this torch has no CUDA"
    if find_spec("triton") is None:
        return False, "triton is not installed"
    return find_spec(needs) is not None, needs
