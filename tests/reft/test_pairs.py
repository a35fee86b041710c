"""Calls and activations of pairs: equal to those of the run itself; shared trajectories."""

import pytest
import tiny
import torch
from reft.subjects import BASE, LAYER, SITES, TEACHER, language, pairs, pipeline, settings

from dreamreader.engine import Reader, Record
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.reft import (
    ActivationMatch,
    Batch,
    Pairs,
    Reft,
    keep_activations,
    record_calls,
    record_pairs,
)

RECORDS = [Record(site, branch="cond") for site in SITES]


def recorded(prompts: list[str]) -> dict[str, torch.Tensor]:
    asked = {"seeds": range(len(prompts)), "output_type": "latent", **settings()}
    cache = pipeline().run(prompts, record=RECORDS, **asked).cache
    return {site: cache[site].tensor for site in SITES}


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart-sigma", "cogview4"])
def test_a_call_made_again_is_the_call_of_the_run(name: str):
    reader = Reader(tiny.pipeline(name))
    component = "unet" if name.startswith("sd") and name != "sd3" else "transformer"
    asked = {"seeds": [0, 1], **tiny.arguments(name, 2)}
    calls = record_calls(reader, ["a red cat", "a blue dog"], batch_size=1, **asked)
    record = Record(f"{component}:out", branch="cond")
    asked["output_type"] = "latent"
    seen = reader.run(["a red cat", "a blue dog"], record=record, batch_size=1, **asked).cache
    with reader.recording(f"{component}:out") as cache, torch.no_grad():
        calls(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1]))
    wanted = seen[f"{component}:out"].tensor
    for entry, (row, step) in enumerate([(1, 0), (0, 1), (1, 1)]):
        found = cache[f"{component}:out"].tensor[entry, 0]
        torch.testing.assert_close(found, wanted[row, step], rtol=1e-4, atol=1e-5)
    assert calls.rows == 2 and [each.step for each in calls.moments] == [0, 1]


def test_on_its_own_trajectory_each_prompt_has_the_activations_of_its_run():
    found = record_pairs(
        pipeline(), BASE, TEACHER, SITES, trajectory="own", batch_size=3, **settings()
    )
    for prompts, values in ((BASE, found.base), (TEACHER, found.teacher)):
        for site, wanted in recorded(prompts).items():
            torch.testing.assert_close(values[site], wanted, rtol=1e-4, atol=1e-5)
    assert found.steps == (0, 1, 2)


def test_on_a_shared_trajectory_pairs_differ_in_the_prompt_alone():
    shared = pairs()
    for site, wanted in recorded(BASE).items():
        torch.testing.assert_close(shared.base[site], wanted, rtol=1e-4, atol=1e-5)
    own = recorded(TEACHER)
    site = SITES[1]  # at the first step the latents are the same noise anyway
    torch.testing.assert_close(shared.teacher[site][:, 0], own[site][:, 0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(shared.teacher[site][:, 2], own[site][:, 2], rtol=1e-4, atol=1e-5)
    other = record_pairs(pipeline(), BASE, TEACHER, SITES, trajectory="teacher", **settings())
    torch.testing.assert_close(other.teacher[site], own[site], rtol=1e-4, atol=1e-5)


def test_above_the_memory_they_go_to_a_file_in_bfloat16():
    found = record_pairs(pipeline(), BASE, TEACHER, SITES, memory=0, **settings())
    for site, values in pairs().base.items():
        assert found.base[site].dtype == torch.bfloat16
        torch.testing.assert_close(found.base[site], values.bfloat16())


@pytest.mark.parametrize("site", ["text_encoder.encoder.layers.0", LAYER])
def test_outside_of_a_denoiser_there_are_no_steps(site: str):
    reader = language() if site == LAYER else pipeline()
    arguments = {} if site == LAYER else settings()
    found = record_pairs(reader, BASE, TEACHER, site, tokens=[0, 1], batch_size=3, **arguments)
    assert found.steps is None and found.base[site].shape[:3] == (4, 1, 2)
    one = reader.run(TEACHER[2], record=Record(site, tokens=[0, 1], branch="cond"), **arguments)
    wanted = one.cache[site].tensor[0, 0]
    torch.testing.assert_close(found.teacher[site][2, 0], wanted, rtol=1e-4, atol=1e-5)


def test_wrong_inputs_say_what_is_wrong():
    with pytest.raises(InvalidInput, match="got 4 base and 3 teacher prompts"):
        record_pairs(pipeline(), BASE, TEACHER[:3], SITES, **settings())
    with pytest.raises(UnknownName, match="unknown trajectory 'bases'; nearest: base"):
        record_pairs(pipeline(), BASE, TEACHER, SITES, trajectory="bases", **settings())
    with pytest.raises(InvalidInput, match="is in the denoiser and text_encoder.* is not"):
        both = [SITES[0], "text_encoder.encoder.layers.0"]
        record_pairs(pipeline(), BASE, TEACHER, both, **settings())
    with pytest.raises(UnknownName, match="unknown branch 'conds'; nearest: cond"):
        record_calls(pipeline(), BASE, branch="conds", **settings())
    with pytest.raises(InvalidInput, match="3 seeds for 4 prompts"):
        record_calls(pipeline(), BASE, seeds=[1, 2, 3], **settings())
    with pytest.raises(InvalidInput, match="calls of a denoiser need a pipeline"):
        record_calls(language(), BASE)
    lacking = (
        r"pair 1 at model.layers.1: tokens 2 of the base have none in the teacher, which has 2"
    )
    with pytest.raises(InvalidInput, match=lacking):
        record_pairs(language(), ["a dog", "a red cat"], ["a cat", "a dog"], LAYER)
    with pytest.raises(InvalidInput, match=r"0: pairs need equal shapes, base .*, teacher nothing"):
        Pairs({"0": torch.zeros(1, 1, 1, 2)}, {}, None)


UNEQUAL = ["a dog", "a red cat on a tree", "a blue house"], ["a cat", "a red dog on a tree", "the "
           "red house on a tree"]  # fmt: skip


def test_tokens_of_unequal_prompts_are_paired_by_their_index():
    asked = (language(), *UNEQUAL, LAYER)
    found, split = (record_pairs(*asked, batch_size=size) for size in (3, 1))
    assert found.counts is not None and split.counts is not None
    for row, prompts in enumerate(zip(*UNEQUAL, strict=True)):
        base, teacher = (
            language().run(each, record=LAYER).cache[LAYER].tensor[0, 0] for each in prompts
        )
        for each in (found, split):
            count = int(each.counts[LAYER][row])
            assert count == len(base) <= len(teacher)
            pairs = (each.base, base), (each.teacher, teacher[:count])
            for got, wanted in pairs:
                torch.testing.assert_close(got[LAYER][row, 0, :count], wanted, rtol=1e-4, atol=1e-5)
    few = record_pairs(*asked, memory=0)
    assert few.base[LAYER].dtype == torch.bfloat16
    torch.testing.assert_close(few.base[LAYER], found.base[LAYER].bfloat16())


def test_the_loss_of_unequal_pairs_is_the_mean_of_that_of_each():
    reader, rows = language(), torch.arange(3)
    first = Batch(rows, torch.zeros(3).long(), 0)
    reft = Reft.for_sites(reader, LAYER, 4, init="pyreft")
    whole = ActivationMatch(record_pairs(reader, *UNEQUAL, LAYER))
    own = [
        ActivationMatch(record_pairs(reader, [base], [teacher], LAYER), {LAYER: 1.0})
        for base, teacher in zip(*UNEQUAL, strict=True)
    ]
    each = [loss.terms(reft, Batch(rows[:1], rows[:1], 0))[LAYER] for loss in own]
    found = whole.terms(reft, first)[LAYER]
    wanted = torch.stack(each).mean() / whole.scales[LAYER]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    none = Reft.for_sites(reader, LAYER, variant="bias")  # adds 0
    unedited = whole.terms(none, first)[LAYER]
    assert float(unedited.detach()) == pytest.approx(1, rel=1e-4)
    kept = keep_activations(record_pairs(reader, UNEQUAL[0], UNEQUAL[0], LAYER), whole)
    assert float(kept.terms(none, first)[LAYER].detach()) == 0
