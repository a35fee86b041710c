"""Visits of a site that are like the last ones take a short way, which gives the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dreamreader as dr
from dreamreader.engine._form import form_of
from dreamreader.errors import InvalidInput
from dreamreader.ops import Instruction, Program, intervene
from dreamreader.ops.intervention import CHANGED, OVERFLOWED, intervention_of

VECTOR = torch.linspace(-1, 1, 8)


class Model(nn.Module):
    """One layer, of which the result is whatever a call wants."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def forms(x: Tensor) -> dict[str, Tensor]:
    """Values that differ from x in one thing each."""
    return {
        "shape": x[:, :2].clone(),
        "strides": x.transpose(0, 1).contiguous().transpose(0, 1),
        "dtype": x.bfloat16(),
        "double": x.double(),
        "dimensions": x.unsqueeze(0)[0, 0],
        "negated": torch._neg_view(-x),
    }


def test_a_form_is_shape_strides_dtype_and_device() -> None:
    x = torch.randn(2, 3, 8)
    has_form = form_of(x)
    assert has_form(x) and has_form(torch.empty_like(x)) and has_form(x.detach().requires_grad_())
    others = forms(x)
    del others["negated"]  # it has the form, and is another kind of number
    others |= {"meta": x.to("meta"), "sparse": x.to_sparse(), "int": x.int()}
    for name, other in others.items():
        assert not has_form(other), name
        assert form_of(other)(other) is (name != "sparse"), name
        assert not form_of(other)(x), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_repeated_program_gives_the_bits_of_intervene(poisoned: None, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, dtype=dtype)
    steps = [
        Instruction("steer", torch.tensor([[0.5], [0.0]]), vectors=VECTOR),
        Instruction("clamp", lo=-1.0, hi=torch.tensor([0.5, 1.0])),
        Instruction("fill", torch.tensor([[0.0, 1.0, 0.0]]), vectors=VECTOR, channels=VECTOR > 0),
    ]
    program = Program(steps, rows=2, tokens=3, width=8)
    apply = intervention_of(program, x)
    for value in (x, -x, forms(x)["strides"], forms(x)["negated"]):
        assert torch.equal(apply(value), intervene(value, program))
    seen = torch.zeros(2, dtype=torch.int32)
    assert torch.equal(apply(x, seen, 1), intervene(x, program))
    assert seen.tolist() == [0, CHANGED]
    with pytest.raises(InvalidInput, match="the program is for"):
        apply(x[:, :2])
    grown = x.clone().requires_grad_()
    apply(grown).sum().backward()
    assert grown.grad is not None


def test_a_repeated_program_tells_overflow() -> None:
    x = torch.full((1, 1, 8), 6e4).half()
    program = Program([Instruction("scale", lo=4.0)], rows=1, tokens=1, width=8)
    seen = torch.zeros(1, dtype=torch.int32)
    intervention_of(program, x)(x, seen, 0)
    assert int(seen) == CHANGED | OVERFLOWED


@pytest.mark.parametrize("what", ["edit", "record"])
def test_values_of_other_forms_in_between(what: str) -> None:
    model, x = Model(), torch.randn(2, 3, 8)
    reader = dr.Reader(model)
    edit = dr.Steer("layer", VECTOR, alpha=0.5)
    layout = "rows tokens features"

    def expected(value: Tensor) -> Tensor:
        wide = value.resolve_neg().to(torch.promote_types(value.dtype, torch.float32))
        return (wide + 0.5 * VECTOR.to(wide.dtype)).to(value.dtype)

    values = [x, x, x]
    for name, other in forms(x).items():
        if name != "dimensions" and (what == "edit" or name in ("strides", "negated")):
            values += [other, other, other, x]
    if what == "edit":
        with reader.editing(edit) as report:
            for value in values:
                assert torch.equal(model(value), expected(value)), value.dtype
        assert report[0].calls == len(values) and report[0].rows == {0, 1}
        assert report[0].branches == {"unknown": len(values)}
        return
    with reader.recording(dr.Record("layer", layout=layout)) as cache:
        for value in values:
            own = value.clone()
            model(own)
            own.zero_()  # what comes later does not show
    assert torch.equal(cache["layer"].tensor[:, 0], torch.cat([v.resolve_neg() for v in values]))


class Counting(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += "dreamreader" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_modes_of_torch_are_followed_within_a_block() -> None:
    model, x = Model(), torch.randn(1, 2, 8)
    run: Callable[[Tensor], Tensor] = model
    with dr.Reader(model).editing(dr.Scale("layer", 3.0)):
        plain = run(x)
        assert torch.equal(run(x), plain) and torch.equal(run(x), plain)
        with Counting() as mode:
            assert torch.equal(run(x), plain)
        assert mode.seen == 1
        with pytest.raises(InvalidInput, match="torch.func.jvp is not written"):
            torch.func.jvp(run, (x,), (torch.ones_like(x),))
        with pytest.raises(InvalidInput, match="torch.func.grad|torch.vmap|torch.func"):
            torch.func.grad(lambda value: run(value).sum())(x)
        grown = x.clone().requires_grad_()
        run(grown).sum().backward()
        assert torch.equal(grown.grad, torch.full_like(x, 3))  # pyright: ignore
        with torch.no_grad():
            assert torch.equal(run(grown), plain)
        with torch.inference_mode():
            assert run(x).is_inference()
        assert torch.equal(run(x), plain)


@pytest.mark.parametrize("acts", [0, 1, 5, 6, None])
def test_a_note_tells_whether_an_edit_ever_changed_a_value(acts: int | None) -> None:
    model, zero, one = Model(), torch.zeros(1, 2, 8), torch.ones(1, 2, 8)
    with torch.no_grad(), dr.Reader(model).editing(dr.Scale("layer", 2.0)) as report:
        for call in range(7):
            x = one if call == acts else zero
            assert torch.equal(model(x), 2 * x)
    idle = ["strength above 0, but no value changed"]
    assert report[0].calls == 7 and report[0].notes == (idle if acts is None else [])


def test_a_long_block_notes_the_last_overflow_of_each_site() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.ones(1, 1, 8).half()
    edits = [dr.Scale("0", 2.0), dr.Scale("1", 2.0)]
    with dr.Reader(model).editing(edits) as report:
        for _ in range(600):
            model(x)
        model(2e4 * x)  # finite behind the first, not behind the second
    assert [each.calls for each in report] == [601, 601]
    assert [each.notes for each in report] == [[], ["overflow to infinity at steps 0"]]


def test_the_memory_limit_holds_at_every_visit() -> None:
    model, x, calls = Model(), torch.randn(1, 4, 8), 0
    with pytest.raises(InvalidInput, match="raise memory_limit"):
        with dr.Reader(model).recording("layer", memory_limit=5 * x.nbytes):
            while calls < 10:
                calls += 1
                model(x)
    assert calls == 6
