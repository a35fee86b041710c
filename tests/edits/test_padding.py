"""Edits of prompts of unequal length and of beams: a row gets what it gets alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import decoders
from torch import Tensor

import dreamreader as dr
from dreamreader import edits
from dreamreader.edits import Ablate, Edit, LoReFT, Mlp, Patch, ProbeGuidance, Steer
from dreamreader.errors import InvalidInput

SITE = "model.layers.0"
SHORT, MIDDLE, LONG = "w5 w6 w7", "w9 w8 w7 w6", "w8 w9 w10 w11 w12 w5 w6 w7"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 2, "min_new_tokens": 2}


@pytest.fixture(scope="module")
def llama() -> dr.Reader:
    return dr.Reader(decoders.build("LlamaForCausalLM"), decoders.tokenizer())


def edited(reader: dr.Reader, prompts: Any, edit: Any = ()) -> list[Tensor]:
    """[own tokens, features] of every row, behind an edit."""
    found = reader.run(prompts, edits=edit, record=SITE).cache[SITE]
    return [
        each[own >= 0] for each, own in zip(found.tensor[:, 0], found.positions[:, 0], strict=True)
    ]


def width(reader: dr.Reader) -> int:
    return reader.run(SHORT, record=SITE).cache[SITE].tensor.shape[-1]


def pulls(x: Tensor) -> Tensor:
    """Logits of all tokens together."""
    return torch.stack([x.square().mean((1, 2)), x.mean((1, 2))], 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda w, source: Ablate(SITE, "noise", sigma=0.5, seed=3),
        lambda w, source: Ablate(SITE, "mean", source=source),
        lambda w, source: Patch(SITE, source, from_rows=1, strength=0.5),
        lambda w, source: ProbeGuidance(SITE, pulls, target=0, alpha=5.0),
        lambda w, source: ProbeGuidance(
            SITE, Mlp([torch.eye(w)[:2]], [torch.zeros(2)]), target=0, pool="mean"
        ),
        lambda w, source: Steer(SITE, torch.ones(w), gate=torch.arange(w) - 8.0),
    ],
    ids=["noise", "mean", "patch", "function", "pooled", "gated"],
)
def test_a_row_gets_in_a_batch_what_it_gets_alone(llama: dr.Reader, make: Callable[..., Any]):
    source = llama.run([LONG, "w7 " * 8], record=SITE).cache
    edit = make(width(llama), source)
    [alone] = edited(llama, SHORT, edit)
    together = edited(llama, [SHORT, LONG], edit)
    torch.testing.assert_close(together[0], alone, rtol=1e-4, atol=1e-5)
    [plain] = edited(llama, SHORT)
    assert not torch.allclose(alone, plain, rtol=1e-3, atol=1e-3)


def test_a_source_of_unequal_prompts_is_that_of_each_alone(llama: dr.Reader):
    batch = llama.run([SHORT, LONG], record=SITE).cache
    apart = [llama.run(each, record=SITE).cache[SITE] for each in (SHORT, LONG)]
    for row, source in enumerate(apart):
        whole, alone = Patch(SITE, batch, from_rows=row), Patch(SITE, source)
        wanted = edited(llama, SHORT, alone)[0]
        torch.testing.assert_close(edited(llama, SHORT, whole)[0], wanted, rtol=1e-4, atol=1e-5)
    mean = edited(llama, LONG, Ablate(SITE, "mean", source=batch))[0]
    short, long = (each.tensor[0, 0] for each in apart)
    expected = torch.cat([(short + long[:3]) / 2, long[3:]])
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)


def test_a_row_of_the_batch_is_copied_token_by_token(llama: dr.Reader):
    plain, copied = (edited(llama, [SHORT, LONG], edit) for edit in ((), Patch(SITE, [1, 1])))
    assert torch.equal(copied[0], plain[1][:3]) and torch.equal(copied[1], plain[1])
    with pytest.raises(InvalidInput, match="tokens 3-7 of row 1 are edited, the source has 3 tok"):
        edited(llama, [SHORT, LONG], Patch(SITE, [0, 0]))
    few = edited(llama, [SHORT, LONG], Patch(SITE, [0, 0], tokens=[0, 2]))
    assert torch.equal(few[1][[0, 2]], plain[0][[0, 2]]) and torch.equal(few[1][1], plain[1][1])
    still = edited(llama, [SHORT, LONG], Patch(SITE, [0, 0], strength=[1.0, 0.0]))
    assert torch.equal(still[1], plain[1])  # what is not changed needs no counterpart


def test_tokens_of_a_tensor_are_nobodys_in_a_padded_batch(llama: dr.Reader):
    values = torch.zeros(8, width(llama))
    assert not edited(llama, [LONG, LONG], Patch(SITE, values))[0].any()
    with pytest.raises(InvalidInput, match="the batch has padding, and which of the 8 tokens of"):
        edited(llama, [SHORT, LONG], Patch(SITE, values))
    assert not edited(llama, [SHORT, LONG], Patch(SITE, values[0]))[0].any()


def test_batches_of_any_width_are_one_recording(llama: dr.Reader):
    prompts = [SHORT, LONG, MIDDLE]
    whole = llama.run(prompts, record=SITE).cache[SITE]
    split = llama.run(prompts, record=SITE, batch_size=1).cache[SITE]
    assert torch.equal(split.positions, whole.positions) and len(split.rows) == 3
    with llama.recording(SITE) as cache, torch.no_grad():
        for each in prompts:
            ids = llama.tokenizer(each, return_tensors="pt").input_ids
            llama.subject(ids)
    block = cache[SITE]
    assert torch.equal(block.positions, whole.positions)
    kept = (whole.positions >= 0)[..., None]
    for found in (split, block):
        left, right = (torch.where(kept, each.tensor, 0) for each in (found, whole))
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_positions_come_back_from_a_file(llama: dr.Reader, tmp_path: Path):
    source = llama.run([SHORT, LONG], record=SITE).cache
    listed = [Patch(SITE, source), Ablate(SITE, "mean", source=source[SITE])]
    edits.save(tmp_path / "edits", listed)
    found = edits.load(tmp_path / "edits")
    assert found == listed
    assert torch.equal(found[0].source[SITE].positions, source[SITE].positions)
    assert torch.equal(found[1].source.positions, source[SITE].positions)
    other = [LONG, SHORT]  # its padding is elsewhere
    pairs = zip(edited(llama, other, listed[1]), edited(llama, other, found[1]), strict=True)
    assert all(torch.equal(*each) for each in pairs)


def per_row(w: int, source: Any) -> dict[str, Any]:
    """Edits that change the second of two rows, by a value for each row."""
    down = torch.stack([torch.zeros(1, w), torch.eye(w)[:1]])
    up = torch.stack([torch.zeros(1, w), 3 * torch.ones(1, w)])
    mlp = Mlp([torch.eye(w)[:2]], [torch.zeros(2)])
    return {
        "adapter": LoReFT(SITE, down, torch.ones(2, 1), up, adapter=[0, 1]),
        "diagonal": LoReFT(SITE, down, torch.ones(2, 1), up, adapter=[0, 1], variant="diagonal"),
        "alpha": Steer(SITE, torch.ones(w), [0.0, 2.0]),
        "gated": Steer(SITE, torch.ones(w), [0.0, 9.0], gate=torch.arange(w) - 8.0),
        "targets": ProbeGuidance(SITE, mlp, target=[None, 1], alpha=[0.0, 4.0]),
        "function": ProbeGuidance(SITE, pulls, target=[1, 0], alpha=[0.0, 90.0]),
        "noise": Ablate(SITE, "noise", sigma=[0.0, 2.0]),
        "resample": Ablate(SITE, "resample", source=source, from_rows=[0, 0], strength=[0.0, 1.0]),
        "patch": Patch(SITE, source, from_rows=[0, 1], strength=[0.0, 1.0]),
        "copy": Patch(SITE, [0, 0], strength=[1.0, 0.5], tokens=[0, 2]),
    }


@pytest.mark.parametrize(
    "name",
    ["adapter", "diagonal", "alpha", "gated", "targets", "function", "noise", "resample", "patch",
     "copy"],
)  # fmt: skip
def test_what_a_row_gets_all_of_its_beams_get_and_no_others(llama: dr.Reader, name: str):
    w = width(llama)
    source = llama.run(["w20 " * 8, "w21 " * 8], record=SITE).cache[SITE]
    edit = per_row(w, source)[name]
    if name in ("resample", "patch"):
        edit = type(edit)(**vars(edit) | {"site": edit.site, "steps": 0})
    record = dr.Record(SITE, steps=0)
    asked = {"record": record, "num_beams": 2, **GREEDY}
    plain = llama.run([SHORT, LONG], **asked)
    found = llama.run([SHORT, LONG], edits=edit, **asked)
    before, after = (each.cache[SITE] for each in (plain, found))
    assert [row.index for row in after.rows] == [0, 0, 1, 1]
    assert torch.equal(before.tensor[:2], after.tensor[:2])
    assert torch.equal(plain.output[0], found.output[0])
    alone = llama.run([SHORT, LONG], edits=edit, record=SITE).cache[SITE].tensor
    for entry in (2, 3):
        torch.testing.assert_close(after.tensor[entry], alone[1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(after.tensor[entry], before.tensor[entry], atol=1e-3)


def test_a_function_is_told_where_padding_is(llama: dr.Reader):
    seen: list[Tensor] = []
    llama.run([SHORT, LONG], edits=Edit(SITE, lambda x, place: seen.append(place.own)))
    assert seen[0].tolist() == [[-1] * 5 + [0, 1, 2], list(range(8))]
