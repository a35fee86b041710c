"""What holds for every registered operator: derivatives, torch's modes, compilation, and memory.

A new operator is covered by being registered: without an `Example` in tests/cases it fails here.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._pytree import tree_flatten, tree_map_only

import dreamreader.ops
from dreamreader import _register
from dreamreader._guards import find_written
from dreamreader.errors import InvalidInput
from tests.cases import OPERATORS
from tests.cases._example import Example
from tests.ops.harness import floats, same

EVERY = [(name, each) for name in sorted(OPERATORS) for each in OPERATORS[name]]
REFUSED_TWICE = "second derivative is not written"


def overload(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.dreamreader, name).default


def ids(value: Any) -> str:
    return value.name if isinstance(value, Example) else value


def those(condition: Callable[[str, Example], Any]) -> pytest.MarkDecorator:
    """All examples of the operators for which the condition holds."""
    chosen = [(name, example) for name, example in EVERY if condition(name, example)]
    return pytest.mark.parametrize(("name", "example"), chosen, ids=ids)


every = those(lambda name, example: True)
some = those(  # what takes a second each
    lambda name, example: example in OPERATORS[name][:: 1 + 5 * (len(OPERATORS[name]) > 6)]
)
learned = those(lambda name, example: example.learned)
in_place = those(lambda name, example: find_written(overload(name)))
functional = those(lambda name, example: not find_written(overload(name)))


def has_gradient(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"dreamreader::{name}", "Autograd")


def results(name: str, args: tuple) -> list[Tensor]:
    """What an operator gives, and what it wrote into."""
    found = overload(name)(*args)
    written = [args[at] for at in find_written(overload(name)) if args[at] is not None]
    return [each for each in tree_flatten((found, written))[0] if isinstance(each, Tensor)]


def test_every_operator_has_an_example():
    assert sorted(_register.active) == sorted(OPERATORS)
    for name, examples in OPERATORS.items():
        assert has_gradient(name) == any(example.learned for example in examples), name
    public = {name for name in dreamreader.ops.__all__ if name in OPERATORS}
    assert {"intervene", "low_rank_", "guide", "pack", "moments", "orthonormal"} <= public


@some
def test_opcheck(name: str, example: Example):
    args = example.arguments(torch.float32)
    values, with_others = floats(args, example.learned)
    learning = with_others(*(each.clone().requires_grad_() for each in values))
    torch.library.opcheck(overload(name), learning)


@some
def test_compiles_without_graph_breaks(name: str, example: Example):
    operator, written = overload(name), find_written(overload(name))

    def called(*args) -> list[Tensor]:
        returned = operator(*args)
        found = returned if isinstance(returned, (list, tuple)) else [returned]
        both = [*found, *(args[at] for at in written)]
        return [each + 1 for each in both if isinstance(each, Tensor)]

    torch.compiler.reset()  # all examples share the code of `called`
    compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
    wanted = called(*example.arguments(torch.float32))
    assert same(compiled(*example.arguments(torch.float32)), wanted)


@learned
def test_first_derivatives(name: str, example: Example):
    values, with_others = floats(example.arguments(torch.float64), example.learned)
    inputs = [each.clone().requires_grad_() for each in values]
    assert gradcheck(lambda *each: overload(name)(*with_others(*each)), inputs)


@learned
def test_second_derivatives_are_right_where_they_are_written(name: str, example: Example):
    values, with_others = floats(example.arguments(torch.float64), example.twice)
    inputs = [each.clone().requires_grad_() for each in values]
    assert gradgradcheck(lambda *each: overload(name)(*with_others(*each)), inputs, fast_mode=True)


@those(lambda name, example: set(example.learned) - set(example.twice))
def test_other_second_derivatives_are_refused(name: str, example: Example):
    """Also where the gradient that arrives is a constant: the result depends on the inputs."""
    rest = tuple(set(example.learned) - set(example.twice))
    if not floats(example.arguments(torch.float64), rest)[0]:
        pytest.skip("this example has none")
    values, with_others = floats(example.arguments(torch.float64), example.learned)
    inputs = [each.clone().requires_grad_() for each in values]
    y = overload(name)(*with_others(*inputs))
    first = torch.autograd.grad(y.sum(), inputs, create_graph=True)
    assert all(each.requires_grad for each in first)
    for each in first:
        with pytest.raises(InvalidInput, match=f"{name}: this {REFUSED_TWICE}"):
            torch.autograd.grad(each.sum(), inputs, retain_graph=True, allow_unused=True)


@those(lambda name, example: not example.learned and not has_gradient(name))
def test_an_input_that_requires_grad_is_refused_where_there_is_no_gradient(
    name: str, example: Example
):
    values, with_others = floats(
        example.arguments(torch.float32), tuple(range(len(overload(name)._schema.arguments)))
    )
    for n in range(len(values)):
        learning = with_others(
            *(each.clone().requires_grad_(at == n) for at, each in enumerate(values))
        )
        with torch.no_grad():
            overload(name)(*learning)
        with pytest.raises(InvalidInput, match=f"{name}: an input requires grad"):
            overload(name)(*learning)


@every
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # in torch's own make_dual
def test_forward_mode_is_refused(name: str, example: Example):
    args = example.arguments(torch.float32)
    values, with_others = floats(args, tuple(range(len(args))))
    for n, value in enumerate(values):
        before = value.clone()
        tangent = torch.ones_like(value)
        with forward_ad.dual_level():
            overload(name)(*example.arguments(torch.float32))  # a constant is none of its business
            dual = with_others(
                *(
                    forward_ad.make_dual(each.clone(), tangent) if at == n else each
                    for at, each in enumerate(values)
                )
            )
            with pytest.raises(InvalidInput, match=f"{name}: an input has a tangent"):
                overload(name)(*dual)
        assert same([value], [before])

        def of_one(other: Tensor, n: int = n) -> Any:
            others = (other if at == n else each for at, each in enumerate(values))
            return overload(name)(*with_others(*others))

        with pytest.raises(InvalidInput, match=f"{name}: torch.func.jvp is not written"):
            torch.func.jvp(of_one, (value.clone(),), (tangent.clone(),))
        assert same([value], [before])


@every
def test_torch_func_grad_is_refused_and_leaves_constants_alone(name: str, example: Example):
    args = example.arguments(torch.float32)
    (first, *_), with_others = floats(args, tuple(range(len(args))))
    rest = floats(args, tuple(range(len(args))))[0][1:]

    def of_first(value: Tensor) -> Tensor:
        return tree_flatten(overload(name)(*with_others(value, *rest)))[0][0].sum()

    with pytest.raises(InvalidInput, match=f"{name}: torch.func.grad is not written"):
        torch.func.grad(of_first)(first.clone())

    def of_another(value: Tensor) -> Tensor:
        same_as(results(name, example.arguments(torch.float32)))
        return value.square()

    want = results(name, example.arguments(torch.float32))

    def same_as(found: list[Tensor]) -> None:
        assert same(found, want)

    assert torch.func.grad(of_another)(torch.tensor(3.0)) == 6


@functional
def test_vmap_is_the_operator_one_by_one(name: str, example: Example):
    args = example.arguments(torch.float32)
    (first, *rest), with_others = floats(args, tuple(range(len(args))))
    rows = torch.stack([first, 2 * first, first - 1], dim=1)

    def of_first(value: Tensor) -> Any:
        return overload(name)(*with_others(value, *rest))

    found = torch.vmap(of_first, in_dims=1)(rows)
    wanted = [of_first(row) for row in rows.unbind(1)]
    if isinstance(found, Tensor):
        found, wanted = (found,), [(each,) for each in wanted]
    for part, parts in zip(found, zip(*wanted, strict=True), strict=True):
        assert same([part], [torch.stack(parts)])


@in_place
def test_vmap_in_place_is_refused(name: str, example: Example):
    args = example.arguments(torch.float32)
    (first, *rest), with_others = floats(args, tuple(range(len(args))))
    with pytest.raises(InvalidInput, match=f"{name}: torch.vmap is not written for an operator in"):
        torch.vmap(lambda each: overload(name)(*with_others(each, *rest)))(first.unsqueeze(0))


@every
def test_autocast_does_not_reach_inside(name: str, example: Example):
    wanted = results(name, example.arguments(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(results(name, example.arguments(torch.float32)), wanted)


@learned
def test_autocast_does_not_reach_inside_a_gradient(name: str, example: Example):
    values, with_others = floats(example.arguments(torch.float32), example.learned)
    twice = floats(example.arguments(torch.float32), example.twice)

    def gradients(values: list[Tensor], with_others: Callable, again: bool) -> list[Tensor]:
        inputs = [each.clone().requires_grad_() for each in values]
        y = tree_flatten(overload(name)(*with_others(*inputs)))[0][0]
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        found = torch.autograd.grad(y, inputs, noise, create_graph=again)
        return [each.detach() for each in found]

    for values_of, with_others_of, again in ((values, with_others, False), (*twice, True)):
        wanted = gradients(values_of, with_others_of, again)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same(gradients(values_of, with_others_of, again), wanted)


def at_the_same_place(tensor: Tensor, memory: Tensor, offset: int) -> Tensor:
    """A dense tensor of the same values, in given bytes."""
    size = tensor.numel() * tensor.element_size()
    view = memory[offset : offset + size].view(tensor.dtype).view(tensor.shape)
    return view.copy_(tensor)


@in_place
def test_memory_that_is_shared_with_what_is_written_is_refused(name: str, example: Example):
    written = find_written(overload(name))
    args = example.arguments(torch.float32)
    tensors = [at for at, each in enumerate(args) if isinstance(each, Tensor) and each.numel()]
    for at in written:
        for other in tensors:
            if other == at or args[at] is None:
                continue
            memory = torch.zeros(1 << 14, dtype=torch.uint8)
            shared = list(example.arguments(torch.float32))
            shared[at] = at_the_same_place(args[at], memory, 0)
            shared[other] = at_the_same_place(shared[other], memory, 0)
            with pytest.raises(InvalidInput, match=f"{name}: what is written, .* shares memory"):
                overload(name)(*shared)
            beside = list(example.arguments(torch.float32))
            beside[at] = at_the_same_place(beside[at], memory, 0)
            beside[other] = at_the_same_place(beside[other], memory, 1 << 13)
            apart = tree_map_only(Tensor, torch.clone, beside)
            assert same(results(name, tuple(beside)), results(name, tuple(apart)))


@functional
def test_results_have_memory_of_their_own(name: str, example: Example):
    args = example.arguments(torch.float32)
    inputs = [each for each in tree_flatten(list(args))[0] if isinstance(each, Tensor)]
    taken = {each.untyped_storage().data_ptr() for each in inputs if each.numel()}
    for each in results(name, args):
        assert not each.numel() or each.untyped_storage().data_ptr() not in taken


@every
def test_a_sign_beside_the_memory_counts(name: str, example: Example):
    """Tensors with torch's negative bit, as the imaginary part of a conjugate has it."""

    def negated(value: Tensor) -> Tensor:
        if value.dtype not in (torch.float32, torch.float64) or not value.numel():
            return value
        return torch.complex(torch.zeros_like(value), -value).conj().imag

    args = example.arguments(torch.float32)
    signed = tree_map_only(Tensor, negated, list(args))
    assert any(isinstance(each, Tensor) and each.is_neg() for each in tree_flatten(signed)[0])
    plain = tree_map_only(Tensor, lambda each: each.clone(), list(signed))
    found = [each.clone() for each in results(name, tuple(signed))]
    assert same(found, [each.clone() for each in results(name, tuple(plain))])


def test_the_same_holds_of_the_references():
    """In a process whose operators have no kernels."""
    if _register.chosen_backend() is not None:
        pytest.skip("runs as the inner one")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", __file__]
    found = subprocess.run(
        [*command, "-k", "autocast or shared or own or sign or refused"],
        env=os.environ | {"DREAMREADER_BACKEND": "reference"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-3000:]
