"""What every operator refuses or undoes before its kernel runs, in one place for all of them.

A kernel sees memory alone. What torch puts beside it, a tangent of forward-mode AD, a wrapper of
torch.func, autocast, the negative bit, would be dropped without a word.
"""

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map, tree_map_only

from dreamreader.errors import InvalidInput

AUTOGRAD_KEYS = [
    key
    for name, key in vars(torch._C.DispatchKey).items()
    if name.startswith(("Autograd", "ADInplaceOrView")) and name != "AutogradFunctionality"
]
AUTOCAST_KEYS = tuple(key for key in dir(torch._C.DispatchKey) if key.startswith("Autocast"))
_autocast_off = torch._C._DisableAutocast
_is_grad_enabled = torch.is_grad_enabled
_requires_grad = attrgetter("requires_grad")
_functorch: Any = vars(torch._C)["_functorch"]
TransformType = _functorch.TransformType


def find_written(op: torch._ops.OpOverload) -> tuple[int, ...]:
    """The places of the arguments that an operator changes."""
    infos = (each.alias_info for each in op._schema.arguments)
    return tuple(at for at, info in enumerate(infos) if info is not None and info.is_write)


def guard_kernel(op: torch._ops.OpOverload, call: Callable, differentiable: bool) -> Callable:
    """A kernel of an operator behind the checks of its arguments.

    Args:
        op: the operator.
        call: its kernel.
        differentiable: whether it has a gradient; without one, inputs that require grad are
            refused while torch records.
    """
    name = op._opname
    kinds = [str(each.type) for each in op._schema.arguments]
    tensors = tuple(at for at, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]"))
    has_lists = any(kind == "List[Tensor]" for kind in kinds)
    # Of every argument that is written, the others; lists are the operator's own matter.
    pairs = [(at, tuple(each for each in tensors if each != at)) for at in find_written(op)]
    pairs = [each for each in pairs if each[1]]

    def kernel(*args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        return call(*args)

    def kernel_without_gradient(*args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if _is_grad_enabled():
            for at in tensors:  # a generator over the arguments takes three times as long
                if (each := args[at]) is not None and each.requires_grad:
                    _refuse_gradients(name)
            if has_lists and any(map(_requires_grad, _tensors(args))):
                _refuse_gradients(name)
        for at, others in pairs:
            if args[at] is not None:
                _refuse_shared(name, args, at, others)
        return call(*args)

    return kernel if differentiable else kernel_without_gradient


def guard_dispatch(library: torch.library.Library, op: torch._ops.OpOverload) -> None:
    """Registers what runs before the kernels under autocast, torch.func and the negative bit.

    A plain call visits none of these keys.
    """

    def without_autocast(*args):
        with _autocast_off():
            return op(*args)

    for key in AUTOCAST_KEYS:
        library.impl(op._opname, without_autocast, key)
    library.impl(
        op._opname, lambda *args: _apply_transformed(op, args), "FuncTorchDynamicLayerFrontMode"
    )
    if find_written(op):
        library.impl(op._opname, lambda *args: _with_signs(op, args), "Negative")


def guard_backward(name: str, backward: Callable, twice: Callable | None) -> Callable:
    """A gradient that autocast does not reach and that is not differentiated where it must not be.

    Args:
        name: of the operator.
        backward: its gradient, as `torch.library.register_autograd` takes it.
        twice: the same gradient in torch code that autograd can follow; NotImplemented from it, or
            None in its place, where there is none.
    """

    def gradient(ctx, *grads):
        with _autocast_off():
            if not _is_grad_enabled():
                return backward(ctx, *grads)
            found = NotImplemented if twice is None else twice(ctx, *grads)
            if found is not NotImplemented:
                return found
            with torch.no_grad():
                found = backward(ctx, *grads)
        sources = [*grads, *ctx.saved_tensors]
        return tree_map_only(Tensor, lambda each: _Once.apply(name, each, *sources), found)

    return gradient


def autograd_on() -> Any:
    """A context for kernels that run autograd, which dispatch modes of torch switch off in them."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


class _Once(torch.autograd.Function):
    """Hands on a gradient that cannot be differentiated in what it was computed from."""

    @staticmethod
    def forward(ctx: Any, name: str, value: Tensor, *sources: Tensor) -> Tensor:
        ctx.name = name
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise InvalidInput(
            f"{ctx.name}: this second derivative is not written, only the first one is; detach "
            "the gradient, or leave create_graph=True out"
        )


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of an operator, those in lists too."""
    for each in args:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, (list, tuple)):
            yield from (one for one in each if isinstance(one, Tensor))


def _has_tangent(value: Tensor) -> bool:
    return forward_ad.unpack_dual(value).tangent is not None


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    if any(map(_has_tangent, _tensors(args))):
        raise InvalidInput(
            f"{name}: an input has a tangent, and forward-mode AD is not written for this "
            "operator; use reverse mode (torch.autograd.grad or torch.autograd.functional)"
        )


def _refuse_gradients(name: str) -> None:
    raise InvalidInput(
        f"{name}: an input requires grad, and this operator has no gradient; detach the "
        "input, or call it under torch.no_grad()"
    )


def _refuse_shared(name: str, args: Sequence[Any], written: int, others: Sequence[int]) -> None:
    """Refuse to write into the memory of another argument."""
    first = args[written].data_ptr()  # 0 where there are no values
    end = first + _extent(args[written])
    for at in others:
        other = args[at]
        if other is None or (start := other.data_ptr()) >= end:
            continue
        if start >= first or start + _extent(other) > first:
            changed, read = (list(args[each].shape) for each in (written, at))
            raise InvalidInput(
                f"{name}: what is written, {changed}, shares memory with another argument, "
                f"{read}; clone one of them"
            )


def _extent(value: Tensor) -> int:
    """Bytes from the first value of a tensor to behind its last."""
    if value.is_contiguous():
        return value.nbytes
    if not value.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    return (last + 1) * value.element_size()


def _with_signs(op: torch._ops.OpOverload, args: Sequence[Any]) -> Any:
    """An operator in place on tensors whose sign is a bit beside their memory."""
    plain = tree_map_only(Tensor, Tensor.resolve_neg, list(args))
    found = op(*plain)
    for at in find_written(op):
        if plain[at] is not args[at]:
            args[at].copy_(plain[at])
    return found


def _apply_transformed(op: torch._ops.OpOverload, args: Sequence[Any]) -> Any:
    """An operator inside of torch.func.vmap, grad, jvp and the like."""
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    interpreter = retrieve_current_functorch_interpreter()
    level, kind = interpreter.level(), interpreter.key()
    mine = [each for each in _tensors(args) if _functorch.maybe_get_level(each) == level]
    if kind in (TransformType.Grad, TransformType.Jvp):
        # Every tensor that is made inside of grad and jvp is wrapped, constants too.
        followed = _requires_grad if kind == TransformType.Grad else _has_tangent
        if not any(followed(each) for each in mine):
            unwrap = _functorch._unwrap_for_grad
            args = tree_map_only(Tensor, lambda each: unwrap(each, level), list(args))
            mine = []
    if not mine:
        with interpreter.lower():
            return op(*args)
    if kind != TransformType.Vmap:
        raise InvalidInput(
            f"{op._opname}: torch.func.{kind.name.lower()} is not written for this operator; use "
            "torch.autograd.grad or torch.autograd.functional"
        )
    if find_written(op):
        raise InvalidInput(
            f"{op._opname}: torch.vmap is not written for an operator in place; call it on the "
            "whole batch, or use the one that returns a new tensor"
        )
    return _one_by_one(op, interpreter, args)


def _one_by_one(op: torch._ops.OpOverload, interpreter: Any, args: Sequence[Any]) -> Any:
    """`op` on each entry of the dimension that vmap runs over."""
    level = interpreter.level()

    def entry(value: Tensor, at: int) -> Tensor:
        plain, dim = _functorch._unwrap_batched(value, level)
        return plain if dim is None else plain.select(dim, at)

    with interpreter.lower():
        found = [
            op(*tree_map_only(Tensor, lambda each, at=at: entry(each, at), list(args)))
            for at in range(interpreter.batch_size())
        ]
        stacked = tree_map(lambda *each: torch.stack(each), *found)
    return tree_map_only(Tensor, lambda each: _functorch._add_batch_dim(each, 0, level), stacked)
