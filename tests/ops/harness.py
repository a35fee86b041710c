"""One check for every operator, case, dtype and back end, and what several tests of them need."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from tests.cases import TESTED
from tests.cases._compare import same_bits
from tests.cases._operator import Kernel, Operator, Results

Run = Callable[[tuple, bool], Results]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def named(value: Any) -> str | None:
    """An id for a case, an operator or a dtype."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "name", None)


def same(a: Results, b: Results) -> bool:
    """Equal to the last bit, all of them."""
    return len(a) == len(b) and all(map(same_bits, a, b))


def floats(args: tuple, places: tuple[int, ...]) -> tuple[list[Tensor], Callable[..., tuple]]:
    """The floating point tensors at these places, and the arguments with others for them."""
    flat, spec = tree_flatten(list(args))
    owner = [at for at, each in enumerate(args) for _ in tree_flatten(each)[0]]
    mine = [
        n
        for n, each in enumerate(flat)
        if owner[n] in places and isinstance(each, Tensor) and each.is_floating_point()
    ]
    mine = [n for n in mine if flat[n].numel()]

    def with_others(*others: Tensor) -> tuple:
        new = list(flat)
        for n, other in zip(mine, others, strict=True):
            new[n] = other
        return tuple(tree_unflatten(new, spec))

    return [flat[n] for n in mine], with_others


def whole(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is part of."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def to_device(args: tuple) -> tuple:
    """The same arguments on a GPU, in the same places of as much memory."""

    def move(tensor: Tensor) -> Tensor:
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        memory = tensor.untyped_storage().cuda()
        return torch.empty(0, dtype=tensor.dtype, device="cuda").set_(memory, *place)

    return tree_map_only(Tensor, move, args)


def check(
    op: Operator,
    case: Any,
    dtype: torch.dtype,
    run: Run,
    device: str = "cpu",
    repeat: bool = True,
    ulps: int = 1,
) -> None:
    """Raises unless `run` is as good as the definition of the operator, and keeps to its memory.

    Args:
        op: the operator.
        case: one of its cases.
        dtype: of the activation.
        run: the back end: takes the arguments, and whether to work in place where that is possible.
        device: where it runs.
        repeat: runs twice, the second time in place where that is possible, for the same bits.
        ulps: of the largest value beyond the rule.
    """
    move = to_device if device == "cuda" else lambda args: args
    try:
        args = move(op.arguments(case, dtype))
        inputs = [at for at in range(len(args)) if at not in op.written]
        before = tree_map_only(Tensor, torch.clone, args)
        memory = [whole(args[at]).clone() if args[at] is not None else None for at in op.written]
        found = run(args, False)
        if op.idle is not None and not op.written:
            assert found[0].stride() == torch.empty_like(args[0]).stride()
        found = [each.clone() for each in found]
        for at in inputs:
            assert same(*(tensors(each[at]) for each in (args, before))), f"argument {at} changed"
        for at, around in zip(op.written, memory, strict=True):
            if around is not None:  # what lies between the elements
                place = (args[at].size(), args[at].stride(), args[at].storage_offset())
                around.as_strided(*place).copy_(args[at])
                assert same_bits(around, whole(args[at])), f"memory around argument {at} changed"
        start = (args if not op.written else before)[op.written[0] if op.written else 0]
        if op.idle is not None and found[0].shape == start.shape:
            untouched = op.idle(before, before[op.written[0] if op.written else 0])
            assert same_bits(op.idle(before, found[0]), untouched), "an idle row changed"
        if repeat:
            assert same(run(move(op.arguments(case, dtype)), True), found), "another run differs"
        here = op.arguments(case, dtype)
        exactly = op.widened(op.arguments(case, dtype))
        expected = op.results(here, op.reference(*here))
        exact = op.results(exactly, op.reference(*exactly))
        for mine, reference in zip(found, expected, strict=True):
            assert mine.dtype == reference.dtype and mine.shape == reference.shape
        extra = {} if ulps == 1 else {"ulps": ulps}
        op.judge(case, [each.cpu() for each in found], expected, exact, **extra)
    except Exception as error:
        error.add_note(f"{op.name}, case {case.name}, {dtype}")
        raise


def tensors(value: Any) -> Results:
    """The tensors in an argument."""
    return [each for each in tree_flatten(value)[0] if isinstance(each, Tensor)]


def by_kernel(field: str) -> pytest.MarkDecorator:
    """Operators with a kernel of a sort, and the types that it takes."""
    chosen = [(op, getattr(op, field)) for op in TESTED.values() if getattr(op, field)]
    pairs = [(op, kernel, dtype) for op, kernel in chosen for dtype in kernel.dtypes]
    return pytest.mark.parametrize(("op", "kernel", "dtype"), pairs, ids=named)


def check_kernel(op: Operator, kernel: Kernel, dtype: torch.dtype, device: str = "cpu") -> None:
    """Every case of a bare kernel, and the number of its launches."""
    launcher, launches = kernel.load(), []

    def counted(*args) -> None:
        launches.append(launcher(*args))

    chosen = kernel.device_cases if device == "cuda" else kernel.cases
    run = partial(op.run_kernel, counted)
    ulps = kernel.ulps if device == "cpu" and dtype == torch.float32 else 1
    for number, case in enumerate((chosen or op.cases)(dtype)):
        repeat = device == "cuda" or number % kernel.repeat == 0
        check(op, case, dtype, run, device, repeat, ulps)
        assert launches[0] is None or launches[0] in kernel.launches(case), case.name
        launches.clear()
