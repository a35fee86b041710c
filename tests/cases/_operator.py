"""An operator for the tests of all operators: its cases, its definition, and how it is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from dreamreader._guards import find_written
from dreamreader.ops._types import FLOATS
from tests.cases._compare import assert_close

Results = list[Tensor]
Cases = Callable[[torch.dtype], Sequence[Any]]


@dataclass(frozen=True)
class Kernel:
    """A kernel that is launched without the operator around it.

    Attributes:
        load: gives the launcher.
        cases: which are run, by dtype; all of the operator without it.
        device_cases: the same on a GPU, where more are cheap.
        dtypes: that it takes.
        ulps: of the largest value beyond the rule, in float32.
        repeat: every how many cases the launch is repeated.
        launches: how many there may be for a case.
    """

    load: Callable[[], Callable]
    cases: Cases | None = None
    device_cases: Cases | None = None
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    ulps: int = 1
    repeat: int = 1
    launches: Callable[[Any], Sequence[int]] = lambda case: (1,)


def triton_of(module: str, few: Sequence[Any], ulps: int = 1) -> Kernel:
    """The Triton implementation of an operator, called as the operator is: see `gather`.

    Args:
        module: of the operator.
        few: the cases in the interpreter, for which a program instance takes long.
        ulps: of the largest value beyond the rule, in float32.
    """

    def load() -> Callable:
        call = import_module(module)._triton
        return lambda results, *args: results.extend(tree_flatten(call(*args))[0])

    return Kernel(
        load,
        lambda dtype: few if dtype == torch.float32 else few[1::3],
        ulps=ulps,
        repeat=4,
    )


def gather(kernel: Callable, args: tuple) -> Results:
    """Runs what `triton_of` loads."""
    results: Results = []
    kernel(results, *args)
    return results


def close(case: Any, got: Results, same: Results, exact: Results, ulps: int = 1) -> None:
    """The tolerance rule for numbers, equality for all else."""
    for mine, reference, best in zip(got, same, exact, strict=True):
        if mine.is_floating_point():
            assert_close(mine, reference, best, ulps)
        else:
            assert torch.equal(mine, reference)


def doubled(args: tuple) -> tuple:
    """The same operands in float64."""
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)


@dataclass(frozen=True)
class Operator:
    """What every back end is tested with.

    Attributes:
        name: of `torch.ops.dreamreader`, or of a plain function with `call`.
        cases: by dtype; each has a name.
        arguments: of a case in a dtype, new ones each time.
        reference: the definition, with these arguments.
        call: what is tested, where it is no registered operator.
        dtypes: of the cases.
        judge: raises unless results are good; gets the case, the results, and those of the
            reference in the same dtype and in float64.
        widened: the arguments for the reference in float64.
        idle: of the arguments and a tensor, the part of it that may change no bit.
        aliased: an operator with this name and `_` does the same in the memory of the first one.
        large: a case and more that several threads share.
        launch: runs a bare kernel on the arguments, where its results are more than one tensor.
        twin, triton: kernels for a GPU.
        device_cases: for the CUDA back end on a GPU.
    """

    name: str
    cases: Cases
    arguments: Callable[[Any, torch.dtype], tuple]
    reference: Callable[..., Any]
    call: Callable[..., Any] | None = None
    dtypes: Sequence[torch.dtype] = FLOATS
    judge: Callable[..., None] = close
    widened: Callable[[tuple], tuple] = doubled
    idle: Callable[[tuple, Tensor], Tensor] | None = None
    aliased: bool = False
    large: Sequence[Any] = ()
    launch: Callable[[Callable, tuple], Results] | None = None
    twin: Kernel | None = None
    triton: Kernel | None = None
    device_cases: Cases | None = None

    @property
    def written(self) -> tuple[int, ...]:
        """Places of the arguments that are written into."""
        if self.call is not None:
            return ()
        return find_written(getattr(torch.ops.dreamreader, self.name).default)

    def results(self, args: tuple, returned: Any) -> Results:
        """What a call gave, and what it wrote into."""
        written = [args[at] for at in self.written if args[at] is not None]
        returned = () if self.written else returned
        return [each for each in tree_flatten((returned, written))[0] if isinstance(each, Tensor)]

    def run(self, args: tuple, again: bool = False) -> Results:
        """The operator; `again` in place, where it can be."""
        in_place = again and self.aliased
        name = self.name + "_" * in_place
        returned = (self.call or getattr(torch.ops.dreamreader, name))(*args)
        return self.results(args, args[0] if in_place else returned)

    def run_kernel(self, kernel: Callable, args: tuple, again: bool = False) -> Results:
        """A bare kernel; `again` in place, where it can be."""
        if self.launch is not None:
            return self.launch(kernel, args)
        if self.written:
            kernel(*args)
            return self.results(args, None)
        out = args[0] if again and self.aliased else torch.empty_like(args[0]).fill_(torch.nan)
        kernel(args[0], out, *args[1:])
        return [out]
