"""Properties of the intervention program that a comparison with the reference does not show."""

import re

import pytest
import torch
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops import Instruction, Program, intervene, intervene_
from tests.cases.intervention import CASES, Case
from tests.cases.intervention import call as example_of
from tests.ops.harness import floats

ROWS, TOKENS, WIDTH = 3, 40, 96
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unit(width: int = WIDTH) -> Tensor:
    v = torch.randn(width)
    return v / v.norm()


def program(
    *instructions: Instruction, shape: tuple[int, int, int] = (ROWS, TOKENS, WIDTH)
) -> Program:
    return Program(instructions, rows=shape[0], tokens=shape[1], width=shape[2])


def every_kind(strength: float | Tensor) -> list[Instruction]:
    index = torch.randint(0, 4, (ROWS, TOKENS))
    return [
        Instruction("steer", strength, vectors=torch.randn(WIDTH)),
        Instruction("scale", strength, lo=2.0),
        Instruction("clamp", strength, lo=-0.1, hi=0.1),
        Instruction("clamp_component", strength, vectors=unit(), lo=0.5),
        Instruction("project", strength, vectors=unit()),
        Instruction("fill", strength, vectors=torch.randn(WIDTH)),
        Instruction("patch", strength, source=torch.randn(4, WIDTH), index=index),
        Instruction("renorm", strength),
    ]


def bits(x: Tensor) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(integer)


def special(dtype: torch.dtype) -> Tensor:
    """NaN, both infinities, both zeros and a subnormal among normal values."""
    x = torch.randn(ROWS, TOKENS, WIDTH).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal / 4
    x[:, ::7, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny]).to(dtype)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", [False, True])
def test_strength_zero_is_bit_equal(dtype: torch.dtype, feature_map: bool, poisoned: None):
    x = special(dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if feature_map else x
    before = bits(x).clone()
    for each in every_kind(0.0):
        assert torch.equal(bits(intervene(x, program(each))), before), each.kind
        assert torch.equal(bits(intervene_(x, program(each))), before), each.kind


@pytest.mark.parametrize("feature_map", [False, True])
@pytest.mark.parametrize("count", [1, 5])
def test_editing_one_row_leaves_the_others_bit_equal(feature_map: bool, count: int):
    x = special(torch.bfloat16)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if feature_map else x
    before = bits(x).clone()
    only = torch.zeros(ROWS, TOKENS)
    only[1, 1::3] = 1.0
    subspace = torch.linalg.qr(torch.randn(WIDTH, count))[0].T
    steps = [*every_kind(only)[:6], Instruction("project", only, vectors=subspace)]
    intervene_(x, program(*steps))
    touched = only.bool()
    assert torch.equal(bits(x)[~touched], before[~touched])
    assert not torch.equal(bits(x)[touched], before[touched])


@pytest.mark.parametrize("chosen", [[8, 9, 30, 77], [8, 9, 11, 12]], ids=["gaps", "one gap"])
@pytest.mark.parametrize("kind", range(7))
def test_channels_outside_the_mask_are_bit_equal(kind: int, chosen: list[int]):
    x = special(torch.float32)
    channels = torch.zeros(WIDTH, dtype=torch.bool)
    channels[chosen] = True
    v = torch.where(channels, torch.randn(WIDTH), 0)
    each = every_kind(1.0)[kind]
    vectors = v / v.norm() if each.vectors is not None else None
    masked = Instruction(
        each.kind, 1.0, vectors, each.lo, each.hi, each.source, each.index, channels
    )
    out = intervene(x, program(masked))
    assert torch.equal(bits(out)[..., ~channels], bits(x)[..., ~channels])
    # NaN outside the mask is not part of <x, v> either.
    assert out[..., channels].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 31, 32, 100])
@pytest.mark.parametrize("count", [1, 9])
def test_a_row_does_not_depend_on_the_rows_around_it(tokens: int, count: int):
    v = torch.linalg.qr(torch.randn(WIDTH, count))[0].T.contiguous()
    x = torch.randn(1, 100, WIDTH)
    steps = [Instruction("steer", vectors=torch.randn(WIDTH)), Instruction("project", vectors=v)]
    all_rows = intervene(x, program(*steps, shape=(1, 100, WIDTH)))
    some = intervene(x[:, :tokens], program(*steps, shape=(1, tokens, WIDTH)))
    assert torch.equal(some, all_rows[:, :tokens])


def test_nan_propagates_through_arithmetic_and_vanishes_under_overwrites():
    x = torch.randn(ROWS, TOKENS, WIDTH)
    x[0, 0, 5] = torch.nan
    *arithmetic, fill, patch, renorm = every_kind(1.0)
    for each in arithmetic:
        assert intervene(x, program(each))[0, 0, 5].isnan(), each.kind
    assert intervene(x, program(arithmetic[4]))[0, 0].isnan().all()  # project: the whole row
    for each in (fill, patch):
        assert intervene(x, program(each)).isfinite().all(), each.kind
    out = intervene(x, program(arithmetic[0], renorm))
    assert out[0, 0].isnan().all() and out[0, 1:].isfinite().all()


def test_zero_rows_survive_renorm():
    x = torch.zeros(ROWS, TOKENS, WIDTH)
    assert torch.equal(intervene(x, program(Instruction("renorm"))), x)
    steered = program(Instruction("steer", vectors=unit()), Instruction("renorm"))
    assert torch.equal(intervene(x, steered), x)  # the norm on entry was 0


def test_overwrites_and_scale_are_exact_at_strength_one():
    x = torch.randn(ROWS, TOKENS, WIDTH)
    factor, bound, values = torch.tensor([0.1, 0.3, -0.7]), 0.1, torch.randn(WIDTH)
    assert torch.equal(
        intervene(x, program(Instruction("scale", lo=factor))), x * factor[:, None, None]
    )
    assert torch.equal(intervene(x, program(Instruction("clamp", hi=bound))), x.clamp(max=bound))
    filled = intervene(x, program(Instruction("fill", vectors=values)))
    assert torch.equal(filled, values.expand_as(x))
    source, index = torch.randn(4, WIDTH), torch.randint(0, 4, (ROWS, TOKENS))
    patched = intervene(x, program(Instruction("patch", source=source, index=index)))
    assert torch.equal(patched, source[index])


def test_steering_there_and_back():
    x, v = torch.randn(ROWS, TOKENS, WIDTH), torch.randn(WIDTH)
    there = intervene(x, program(Instruction("steer", 3.0, vectors=v)))
    back = intervene(there, program(Instruction("steer", -3.0, vectors=v)))
    torch.testing.assert_close(back, x, rtol=0, atol=2e-6)


def test_one_rounding_for_the_whole_program():
    x = torch.full((1, 1, 64), 1.0, dtype=torch.bfloat16)
    small = torch.full(
        (64,), 2.0**-9
    )  # a quarter of the spacing above 1: lost if rounded each time
    out = intervene(x, program(*[Instruction("steer", vectors=small)] * 4, shape=(1, 1, 64)))
    assert torch.equal(out, torch.full_like(x, 1.0 + 2.0**-7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_round_to_nearest_even_as_torch_does(dtype: torch.dtype):
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2, 64, 200), generator=g, dtype=torch.int64)
    ties = bits & ~0xFFFF | 0x8000  # of bfloat16
    source = torch.cat([bits, ties], 1).int().view(torch.float32)  # NaN and subnormals among them
    x = torch.zeros(source.shape, dtype=dtype)
    index = torch.arange(256).view(2, 128)
    patch = Instruction("patch", source=source.reshape(256, 200), index=index)
    out = intervene(x, program(patch, shape=(2, 128, 200)))
    expected = source.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any()
    assert torch.equal(out.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))


def test_same_bits_every_time_on_any_number_of_threads():
    x = torch.randn(2, 700, 320)
    v = torch.linalg.qr(torch.randn(320, 3))[0].T.contiguous()
    steps = [Instruction("steer", vectors=torch.randn(320)), Instruction("renorm")]
    both = [program(*steps, shape=(2, 700, 320))]
    both.append(program(Instruction("project", vectors=v), shape=(2, 700, 320)))
    before = torch.get_num_threads()
    try:
        for each in both:
            results = []
            for threads in (1, 2, 3, 2, 1):
                torch.set_num_threads(threads)
                results.append(intervene(x, each))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [31, 33, 63, 64, 65, 80, 96, 97, 127, 129, 200])
def test_a_new_result_has_the_bits_of_one_in_place(dtype: torch.dtype, width: int):
    x = torch.randn(ROWS, 5, width).to(dtype)
    strength = torch.tensor([[0.5], [0.0], [1.0]])
    for each in (
        Instruction("steer", strength, vectors=torch.randn(width)),
        Instruction("scale", strength, lo=2.0),
        Instruction("clamp", strength, lo=-0.5, hi=0.5),
        Instruction("fill", strength, vectors=torch.randn(width)),
    ):
        one = program(each, shape=(ROWS, 5, width))
        assert torch.equal(intervene(x, one), intervene_(x.clone(), one)), each.kind


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_source_that_shares_memory_with_x(strength: float):
    x = torch.randn(1, TOKENS, WIDTH)
    index = torch.arange(TOKENS).flip(0).unsqueeze(0)  # reads rows that were written before
    swap = program(
        Instruction("patch", strength, source=x[0], index=index), shape=(1, TOKENS, WIDTH)
    )
    expected = x + strength * (x.flip(1) - x) if strength != 1.0 else x.flip(1)
    torch.testing.assert_close(intervene_(x, swap), expected, rtol=0, atol=1e-6)


def test_in_place_bumps_the_version_so_that_autograd_notices():
    x = torch.randn(1, 2, WIDTH)
    each = program(Instruction("scale", lo=2.0), shape=(1, 2, WIDTH))
    w = torch.ones(1, 2, WIDTH, requires_grad=True)
    product = (w * x).sum()
    version = x._version
    assert intervene_(x, each) is x
    assert x._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_with_strengths_shares_the_tables():
    v = torch.randn(WIDTH)
    first = program(Instruction("steer", 1.0, vectors=v))
    x = torch.randn(ROWS, TOKENS, WIDTH)
    for strength in (1.0, 2.0, 5.0):  # the first program runs before the second is made, and after
        alone = intervene(x, program(Instruction("steer", strength, vectors=v)))
        second = first.with_strengths([torch.full((ROWS, 1), strength)])
        assert second.vectors is first.vectors
        assert torch.equal(intervene(x, second), alone)
        assert torch.equal(intervene(x, first), x + v)
    with pytest.raises(InvalidInput, match="has 1 instructions, got 2 strengths"):
        first.with_strengths([1.0, 2.0])


def test_a_program_that_is_gone_is_an_error():
    number = program(Instruction("renorm")).number
    with pytest.raises(InvalidInput, match=f"intervention program {number} no longer exists"):
        torch.ops.dreamreader.intervene_live_(torch.zeros(ROWS, TOKENS, WIDTH), number)


def test_a_live_program_of_another_shape_is_refused_by_the_kernel():
    each = program(Instruction("steer", torch.ones(ROWS, TOKENS), vectors=unit()))
    with pytest.raises((ValueError, RuntimeError), match="strength must be|must match"):
        torch.ops.dreamreader.intervene_live_(torch.zeros(ROWS, TOKENS + 1, WIDTH), each.number)


def test_strengths_that_do_not_vary_are_not_expanded():
    packed = program(Instruction("steer", 1.0, vectors=unit())).strength
    assert packed.shape == (1, ROWS, TOKENS) and packed.untyped_storage().nbytes() == 4


BAD: list[tuple[str, dict, str]] = [
    ("steer", {}, "instruction 0 (steer): needs vectors"),
    ("clamp", {"vectors": torch.ones(WIDTH), "lo": 0.0}, "instruction 0 (clamp): takes no vectors"),
    ("steer", {"vectors": torch.ones(WIDTH + 1)}, "x has 96 features, vectors is float32 [97]"),
    ("steer", {"vectors": torch.ones(2, WIDTH)}, "takes 1 to 1 vectors, got 2"),
    (
        "steer",
        {"vectors": torch.full((WIDTH,), torch.nan)},
        "vectors has values that are not finite",
    ),
    (
        "steer",
        {"vectors": torch.ones(WIDTH), "strength": torch.inf},
        "strength has values that are not",
    ),
    (
        "steer",
        {"vectors": torch.ones(WIDTH), "strength": torch.ones(5)},
        "must broadcast to [3, 40], got [5]",
    ),
    (
        "project",
        {"vectors": torch.ones(WIDTH)},
        "vectors must be orthonormal within the selected channels",
    ),
    ("project", {"vectors": torch.eye(WIDTH)[:65]}, "takes 1 to 64 vectors, got 65"),
    (
        "project",
        {"vectors": torch.eye(WIDTH)[:2], "one_sided": True},
        "takes 1 to 1 vectors, got 2",
    ),
    ("fill", {"vectors": torch.ones(WIDTH), "one_sided": True}, "one_sided belongs to project"),
    ("scale", {}, "needs its factor as lo"),
    ("scale", {"lo": torch.inf}, "factor (lo) has values that are not finite"),
    ("clamp", {}, "needs lo, hi or both"),
    ("clamp", {"lo": 1.0, "hi": 0.0}, "lo is above hi"),
    ("clamp", {"lo": torch.ones(4)}, "lo must be a number or [3], got [4]"),
    ("clamp", {"lo": torch.nan}, "lo is NaN"),
    ("clamp", {"lo": torch.ones(3, requires_grad=True)}, "lo gets no gradient"),
    ("renorm", {"lo": 0.0}, "takes no lo or hi"),
    (
        "renorm",
        {"channels": torch.zeros(WIDTH, dtype=torch.bool)},
        "channels selects none of the 96",
    ),
    (
        "renorm",
        {"channels": torch.ones(4, dtype=torch.bool)},
        "channels must be bool [96], got bool [4]",
    ),
    ("patch", {}, "needs source and index"),
    (
        "patch",
        {"source": torch.ones(2, 5), "index": torch.zeros(1, 1, dtype=torch.int64)},
        "source must be [entries, 96], got float32 [2, 5]",
    ),
    (
        "patch",
        {"source": torch.ones(2, WIDTH), "index": torch.full((1, 1), 2)},
        "index runs over 2 .. 2, source has 2 entries",
    ),
    (
        "patch",
        {"source": torch.ones(2, WIDTH), "index": torch.zeros(7, dtype=torch.int64)},
        "index must be int64 [3, 40], got int64 [7]",
    ),
    ("renorm", {"source": torch.ones(2, WIDTH)}, "takes no source or index"),
]


@pytest.mark.parametrize(("kind", "arguments", "text"), BAD, ids=[text for *_, text in BAD])
def test_bad_instructions(kind: str, arguments: dict, text: str):
    with pytest.raises(InvalidInput, match=re.escape(text)):
        program(Instruction(kind, **arguments))


def test_unknown_kind_names_the_nearest():
    with pytest.raises(UnknownName, match="unknown instruction 'steeer'; nearest: steer"):
        program(Instruction("steeer"))


def test_limits_of_a_program():
    renorm = Instruction("renorm")
    with pytest.raises(InvalidInput, match="holds up to 32 instructions, got 33"):
        program(*[renorm] * 33)
    patch = Instruction(
        "patch", source=torch.ones(1, WIDTH), index=torch.zeros(1, 1, dtype=torch.int64)
    )
    with pytest.raises(InvalidInput, match="holds up to 8 patches"):
        program(*[patch] * 9)


@pytest.mark.parametrize("call", [intervene, intervene_])
def test_bad_activations(call):
    each = program(Instruction("renorm"))
    name = call.__name__
    with pytest.raises(InvalidInput, match=f"{name}: x has 97 features, the program 96"):
        call(torch.zeros(ROWS, TOKENS, 97), each)
    with pytest.raises(
        InvalidInput, match=re.escape(f"{name}: x is [3, 41, 96], the program is for")
    ):
        call(torch.zeros(ROWS, 41, WIDTH), each)
    with pytest.raises(InvalidInput, match=f"{name}: x is torch.int64, floating point"):
        call(torch.zeros(ROWS, TOKENS, WIDTH, dtype=torch.int64), each)
    with pytest.raises(InvalidInput, match=f"{name}: x is on meta, the program on cpu"):
        call(torch.zeros(ROWS, TOKENS, WIDTH, device="meta"), each)


def test_in_place_refuses_what_it_cannot_do():
    each = program(Instruction("scale", lo=2.0))
    with pytest.raises(InvalidInput, match="x requires grad and an edit in place has no gradient"):
        intervene_(torch.zeros(ROWS, TOKENS, WIDTH, requires_grad=True), each)
    shared = torch.zeros(1, TOKENS, WIDTH).expand(ROWS, TOKENS, WIDTH)
    with pytest.raises((ValueError, RuntimeError), match="single memory location|share memory"):
        intervene_(shared, each)


def test_a_program_that_learns_is_refused_in_place_while_gradients_are_recorded():
    v = torch.ones(WIDTH, requires_grad=True)
    steer = Instruction("steer", 2.0, vectors=v)
    program = Program([steer], rows=ROWS, tokens=TOKENS, width=WIDTH)
    x = torch.zeros(ROWS, TOKENS, WIDTH)
    with pytest.raises(InvalidInput, match="a table of the program requires grad and an"):
        intervene_(x, program)
    with torch.no_grad():
        assert torch.equal(intervene_(x, program), torch.full_like(x, 2.0))


def test_orthonormal_rows_are_accepted_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for seed in range(200):
            g = torch.Generator().manual_seed(seed)
            rows = torch.linalg.qr(torch.randn(4, 2, generator=g))[0].T
            Program([Instruction("project", vectors=rows)], rows=1, tokens=1, width=4)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_is_refused_by_name(dtype: torch.dtype):
    x = torch.zeros(ROWS, TOKENS, WIDTH).to(dtype)
    program = Program([Instruction("scale", lo=2.0)], rows=ROWS, tokens=TOKENS, width=WIDTH)
    for call in (intervene, intervene_):
        with pytest.raises(InvalidInput, match="float8_e.*floating point is needed: float32, bfl"):
            call(x, program)


def test_second_derivatives_of_rows_without_length_are_finite():
    x = torch.randn(1, 3, WIDTH, dtype=torch.float64)
    x[0, 1] = 0
    x.requires_grad_()
    instructions = [Instruction("scale", 0.5, lo=3.0), Instruction("renorm", 0.3)]
    y = intervene(x, Program(instructions, rows=1, tokens=3, width=WIDTH))
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert first.isfinite().all() and second.isfinite().all()


SMALL = [
    Case(case.name, (2, 4, 11), case.make, case.layout)
    for case in CASES
    if case.shape in ((2, 33, 72), (3, 5, 123)) and case.layout in ("dense", "nchw")
    if "64" not in case.name
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gradient(case: Case):
    example = example_of(case)
    values, with_others = floats(example.arguments(torch.float64), (0, 2, 3, 6))
    inputs = [each.clone().requires_grad_() for each in values]
    operator = torch.ops.dreamreader.intervene
    assert torch.autograd.gradcheck(lambda *each: operator(*with_others(*each)), inputs)
