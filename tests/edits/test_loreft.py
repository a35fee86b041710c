"""LoReFT on a real attention output of a tiny pipeline, by hand; identities, tables, gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from edits.test_edits import SITE, WIDTH, direction, plain, reader, run, values
from torch import Tensor

from dreamreader import edits
from dreamreader.edits import LoReFT, Steer
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName


def tables(rank: int = 3, *stack: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(*stack, rank, WIDTH, generator=generator) for _ in range(2))
    return 0.3 * down, torch.randn(*stack, rank, generator=generator), 0.3 * up


def by_hand(x: Tensor, down: Tensor, bias: Tensor, up: Tensor, alpha: float = 1.0) -> Tensor:
    return x + alpha * (x @ down.T + bias) @ up


DOWN, BIAS, UP = tables()


@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_the_change_by_hand(alpha: float):
    before, after = values(LoReFT(SITE, DOWN, BIAS, UP, alpha))
    torch.testing.assert_close(after, by_hand(before, DOWN, BIAS, UP, alpha))


def test_a_scale_and_a_shift_for_each_channel():
    a, c = direction(1)[None], direction(2)[None]
    before, after = values(LoReFT(SITE, a, torch.zeros(1), c, 0.5, variant="diagonal"))
    torch.testing.assert_close(after, before + 0.5 * (a * before + c))


@pytest.mark.parametrize(
    "edit",
    [
        LoReFT(SITE, DOWN, BIAS, UP, 0.0),
        LoReFT(SITE, DOWN[:1], BIAS[:1], UP[:1], 0.0, variant="diagonal"),
        LoReFT(SITE, torch.zeros_like(DOWN), torch.zeros_like(BIAS), UP),
        LoReFT(SITE, DOWN, BIAS, UP, steps=[]),
    ],
    ids=["alpha 0", "alpha 0, diagonal", "A = 0 and b = 0", "no steps"],
)
def test_identities_are_bit_equal_to_no_edit(edit: LoReFT):
    result = run(edit, record=SITE)
    assert torch.equal(result.images, plain().images)
    assert torch.equal(result.cache[SITE].tensor, plain().cache[SITE].tensor)


@pytest.mark.parametrize(
    "edit",
    [
        LoReFT(SITE, DOWN, BIAS, UP, [0.0, 2.0, 0.0]),
        LoReFT(SITE, DOWN[:1], BIAS[:1], UP[:1], [0.0, 2.0, 0.0], variant="diagonal"),
        LoReFT(SITE, DOWN, BIAS, UP, rows=1),
    ],
    ids=["alpha", "alpha, diagonal", "rows"],
)
def test_editing_one_row_leaves_the_others_bit_equal(edit: LoReFT):
    result = run(edit)
    assert torch.equal(result.images[[0, 2]], plain().images[[0, 2]])
    assert not torch.equal(result.images[1], plain().images[1])


def test_only_the_selected_tokens_and_branch_change():
    before, after = values(LoReFT(SITE, DOWN, BIAS, UP, tokens=[0, 2], branch="cond"))
    wanted = before.clone()
    wanted[:, 1, [0, 2]] = by_hand(before[:, 1, [0, 2]], DOWN, BIAS, UP)
    torch.testing.assert_close(after, wanted)
    assert torch.equal(after[:, 0], before[:, 0])


def test_each_step_has_its_own_table_and_a_missing_step_is_an_error():
    down, bias, up = tables(3, 2)
    found = run(LoReFT(SITE, down, bias, up), record=SITE).cache[SITE].tensor
    before = plain().cache[SITE].tensor
    first = by_hand(before[:, :, 0], down[0], bias[0], up[0])
    torch.testing.assert_close(found[:, :, 0], first)
    alone = [LoReFT(SITE, down[n], bias[n], up[n], steps=n) for n in range(2)]
    assert torch.equal(found, run(*alone, record=SITE).cache[SITE].tensor)
    with pytest.raises(InvalidInput, match=f"LoReFT at {SITE}: holds 1 steps, the running step is"):
        run(LoReFT(SITE, down[:1], bias[:1], up[:1]))


@pytest.mark.parametrize("steps", [(), (2,)], ids=["one for all steps", "one for each step"])
def test_several_adapters_in_one_batch_are_what_each_is_alone(steps: tuple[int, ...]):
    down, bias, up = tables(3, 3, *steps)
    found = run(LoReFT(SITE, down, bias, up, adapter=[2, 0, 2]), record=SITE).cache[SITE].tensor
    for row, number in enumerate([2, 0, 2]):
        edit = LoReFT(SITE, down[number], bias[number], up[number])
        alone = run(edit, record=SITE).cache[SITE].tensor
        torch.testing.assert_close(found[row], alone[row], rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_fill_up_a_smaller_rank():
    filled = [torch.cat([each, torch.zeros_like(each)]) for each in (DOWN, BIAS, UP)]
    _, found = values(LoReFT(SITE, *filled))
    torch.testing.assert_close(found, values(LoReFT(SITE, DOWN, BIAS, UP))[1])


def test_it_composes_with_other_edits_in_order():
    v, edit = direction(), LoReFT(SITE, DOWN, BIAS, UP)
    before, after = values(Steer(SITE, v, 2.0), edit)
    torch.testing.assert_close(after, by_hand(before + 2 * v, DOWN, BIAS, UP))
    _, turned = values(edit, Steer(SITE, v, 2.0))
    torch.testing.assert_close(turned, by_hand(before, DOWN, BIAS, UP) + 2 * v)


def test_a_mapping_names_the_tables_of_each_site():
    other = SITE.replace("attn2", "attn1")
    given = [{SITE: each, other: torch.zeros_like(each)} for each in (DOWN, BIAS, UP)]
    _, found = values(LoReFT([SITE, other], *given))
    assert torch.equal(found, values(LoReFT(SITE, DOWN, BIAS, UP))[1])


def test_gradients_flow_to_the_activation_the_tables_and_the_strength():
    layer = torch.nn.Linear(4, 4).double()
    subject = Reader(torch.nn.Sequential(layer))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    given = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 4), (2,), (2, 4))]
    down, bias, up = (each.requires_grad_() for each in given)
    alpha = torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)
    with subject.editing(LoReFT("0", down, bias, up, alpha)):
        found = subject.subject(x)
    h = layer(x)
    expected = h + alpha[:, None, None] * (h @ down.T + bias) @ up
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    inputs = [down, bias, up, alpha, layer.weight]
    got, want = (
        torch.autograd.grad((each * weight).sum(), inputs, retain_graph=True)
        for each in (found, expected)
    )
    for mine, reference in zip(got, want, strict=True):
        torch.testing.assert_close(mine, reference)
    assert float(want[3][0].abs()) > 0  # a strength learns from 0 on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["loreft", "diagonal"])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, variant: str):
    layer = torch.nn.Linear(64, WIDTH).to(dtype)
    subject, x = Reader(torch.nn.Sequential(layer)), torch.randn(2, 7, 64, dtype=dtype)
    h = layer(x)
    rank = 1 if variant == "diagonal" else 3
    with subject.editing(LoReFT("0", DOWN[:rank], BIAS[:rank], UP[:rank], variant=variant)):
        out = subject.subject(x)
    wide = h.float()
    expected = by_hand(wide, DOWN, BIAS, UP)
    if variant == "diagonal":
        expected = wide + DOWN[:1] * wide + UP[:1]
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype), rtol=2e-2, atol=2e-3)


def test_files_give_it_back_equal(tmp_path: Path):
    listed = [
        LoReFT(SITE, DOWN, BIAS, UP, [0.0, 1.0], variant="direft", tokens=[0], branch="cond"),
        LoReFT(SITE, *tables(2, 3), adapter=[0, 2, 1]),
        LoReFT([SITE, "a"], {SITE: DOWN, "a": DOWN}, {SITE: BIAS, "a": BIAS}, {SITE: UP, "a": UP}),
    ]
    edits.save(tmp_path / "edits.safetensors", listed)
    assert edits.load(tmp_path / "edits.safetensors") == listed


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (
            lambda: run(LoReFT(SITE, DOWN[:, :5], BIAS, UP[:, :5])),
            InvalidInput,
            f"LoReFT at {SITE}: made for 5 features, the site has 32",
        ),
        (
            lambda: run(LoReFT(SITE, {"a": DOWN}, {"a": BIAS}, {"a": UP})),
            UnknownName,
            f"unknown LoReFT: down for site '{SITE}'; nearest: a",
        ),
        (
            lambda: LoReFT(SITE, DOWN, {SITE: BIAS}, UP),
            InvalidInput,
            "down, bias and up must be tensors, or mappings all three",
        ),
        (
            lambda: LoReFT(SITE, DOWN / 0, BIAS, UP),
            InvalidInput,
            r"down has 96 of 96 values that are not finite",
        ),
        (
            lambda: LoReFT(SITE, DOWN, BIAS, UP, float("nan")),
            InvalidInput,
            "LoReFT: alpha has 1 of 1 values that are not finite",
        ),
        (
            lambda: LoReFT(SITE, DOWN.T, torch.zeros(32), DOWN.T),
            InvalidInput,
            "rank 32 is above the width 3",
        ),
        (
            lambda: LoReFT(SITE, DOWN, BIAS[:2], UP),
            InvalidInput,
            r"got \[3, 32\], \[2\], \[3, 32\]",
        ),
        (
            lambda: LoReFT(SITE, DOWN, BIAS, UP, adapter=[0]),
            InvalidInput,
            r"down must be \[adapters, rank, features\], with steps before rank or without",
        ),
        (
            lambda: run(LoReFT(SITE, *tables(2, 2), adapter=[0, 2, 1])),
            InvalidInput,
            f"LoReFT at {SITE}: adapter 2 was asked for, there are 2",
        ),
        (
            lambda: run(LoReFT(SITE, *tables(2, 2), adapter=[1, -1, 0])),
            InvalidInput,
            f"LoReFT at {SITE}: adapter -1 was asked for, there are 2",
        ),
        (
            lambda: LoReFT(SITE, *tables(2, 2), adapter=[0.5]),  # pyright: ignore
            InvalidInput,
            "adapter must be a number or one for each row",
        ),
    ],
    ids=[
        "width",
        "site",
        "mapping",
        "tables",
        "alpha",
        "rank",
        "bias",
        "stack",
        "adapter",
        "negative adapter",
        "half an adapter",
    ],
)
def test_wrong_inputs_say_what_is_wrong(make: Any, kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        make()


def test_an_edit_whose_module_never_runs_says_so():
    from dreamreader.errors import NeverFired

    with (
        pytest.raises(NeverFired, match="never fired at unet.mid_block"),
        reader().editing(LoReFT(SITE, DOWN, BIAS, UP)),
    ):
        pass


def test_tables_that_learn_are_never_kept_in_another_dtype():
    layer = torch.nn.Linear(4, 4)
    subject, x = Reader(torch.nn.Sequential(layer)), torch.randn(2, 5, 4)
    given = [torch.randn(*shape, dtype=torch.bfloat16) for shape in ((2, 4), (2,), (2, 4))]
    down, bias, up = (each.requires_grad_() for each in given)
    edit = LoReFT("0", down, bias, up)
    with torch.no_grad(), subject.editing(edit):
        subject.subject(x)
    with torch.no_grad():
        up += 1
    with subject.editing(edit):
        found = subject.subject(x)
    wide = [each.detach().float() for each in given]
    torch.testing.assert_close(found, by_hand(layer(x), *wide))
    found.sum().backward()
    assert all(each.grad is not None for each in given)


def test_tables_are_those_of_each_precision():
    narrow = torch.nn.Linear(WIDTH, WIDTH)
    x = torch.randn(2, 5, WIDTH)
    tables = [each.double() / 3 for each in (DOWN, BIAS, UP)]
    edit = LoReFT("0", *tables)
    for dtype in (torch.float32, torch.float64, torch.float32):
        subject = Reader(torch.nn.Sequential(narrow.to(dtype)))
        with subject.editing(edit):
            found = subject.subject(x.to(dtype))
        assert found.dtype == dtype
        wanted = by_hand(narrow(x.to(dtype)), *(each.to(dtype) for each in tables))
        torch.testing.assert_close(found, wanted)
