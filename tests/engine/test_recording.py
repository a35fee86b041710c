"""Recordings: exact values, canonical layout, coordinates, bounded memory, caches."""

from functools import cache
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from dreamreader.engine import Activation, Cache, Reader, Record
from dreamreader.errors import InvalidInput, UnknownName

SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
PROMPTS = ["a red cat", "a dog"]


@cache
def reader() -> Reader:
    return Reader(tiny.pipeline("sd"))


def run(record: Any, **kw: Any) -> Cache:
    arguments = {"seeds": 1, "output_type": "latent", **tiny.arguments("sd", 3), **kw}
    return reader().run(PROMPTS, record=record, **arguments).cache


def test_values_equal_those_of_a_plain_hook() -> None:
    seen: list[Tensor] = []
    module = reader().subject.unet.mid_block
    handle = module.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    found = run("unet.mid_block")["unet.mid_block"]
    handle.remove()
    by_hand = torch.stack(seen).unflatten(1, (2, 2)).flatten(4).permute(2, 1, 0, 4, 3)
    assert torch.equal(found.tensor, by_hand)
    assert found.axes == ("rows", "branch", "steps", "tokens", "features")
    assert found.hw == (4, 6)
    assert torch.equal(found.grid[1, 0, 2], seen[2][1].permute(1, 2, 0))


def test_coordinates() -> None:
    found = run(SITE)[SITE]
    assert [row.prompt for row in found.rows] == PROMPTS
    assert [row.seed for row in found.rows] == [1, 2]
    assert found.branches == ("uncond", "cond")
    assert [each.step for each in found.steps] == [0, 1, 2]
    scheduler = reader().subject.scheduler
    assert [each.timestep for each in found.steps] == scheduler.timesteps.tolist()
    assert [each.fraction for each in found.steps] == [0, 1 / 3, 2 / 3]
    assert all(each.sigma is not None and each.sigma > 0 for each in found.steps)


def test_select_keeps_every_axis_but_a_single_branch() -> None:
    found = run(SITE)[SITE]
    part = found.select(step=slice(1, None), branch="cond", rows=[1], tokens=[0, 3])
    assert part.shape == (1, 2, 2, 32)
    assert torch.equal(part.tensor, found.tensor[1:, 1, 1:][:, :, [0, 3]])
    assert part.tokens == (0, 3) and part.rows == found.rows[1:] and part.branches == ("cond",)
    assert [each.step for each in part.steps] == [1, 2]
    swapped = found.select(branch=("cond", "uncond"))
    assert torch.equal(swapped.tensor, found.tensor.flip(1))
    with pytest.raises(UnknownName, match="unknown branch 'conf'; nearest: cond"):
        found.select(branch="conf")
    with pytest.raises(InvalidInput, match="no step matches 7; recorded are 0, 1, 2"):
        found.select(step=7)
    with pytest.raises(InvalidInput, match="rows: 2 asked for, there are 2"):
        found.select(rows=2)
    with pytest.raises(InvalidInput, match="are no grid"):
        _ = part.grid


def test_a_later_change_in_place_does_not_show() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.last = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            z = y.clone()
            y.mul_(2)
            return self.last(y) + z

    model = Doubles()
    x = torch.randn(2, 4, 3)
    with torch.no_grad(), Reader(model).recording(["inner", "last:in"]) as cache:
        model(x)
    inner = model.inner(x).detach()
    assert torch.equal(cache["inner"].tensor[:, 0], inner)
    assert torch.equal(cache["last:in"].tensor[:, 0], 2 * inner)


def test_a_record_narrows_what_is_kept() -> None:
    whole = run(SITE)[SITE]
    record = Record(
        SITE, steps=[0, 2], branch="cond", rows=1, tokens=slice(0, 5), dtype=torch.bfloat16
    )
    found = run(record)[SITE]
    assert found.shape == (1, 2, 5, 32) and found.tensor.dtype == torch.bfloat16
    assert torch.equal(found.tensor, whole.tensor[1:, 1, [0, 2], :5].bfloat16())
    assert found.rows[0].prompt == "a dog" and found.tokens == (0, 1, 2, 3, 4)
    assert reader().subject.unet.dtype == torch.float32


def test_reduce_runs_before_values_are_stored() -> None:
    whole = run(f"{SITE}:heads")[f"{SITE}:heads"]
    found = run(Record(f"{SITE}:heads", reduce=lambda x: x.mean(1, keepdim=True)))
    assert torch.equal(found[f"{SITE}:heads"].tensor, whole.tensor.mean(3, keepdim=True))


def test_reduce_has_to_return_a_tensor() -> None:
    with pytest.raises(InvalidInput, match="reduce has to return a tensor, got NoneType"):
        run(Record(SITE, reduce=lambda x: None))  # pyright: ignore[reportArgumentType]


def test_batches_join_along_the_rows() -> None:
    whole, split = run(SITE)[SITE], run(SITE, batch_size=1)[SITE]
    assert split.rows == whole.rows
    torch.testing.assert_close(split.tensor, whole.tensor, rtol=1e-4, atol=1e-5)


def test_batches_join_by_site_where_each_records_another() -> None:
    records = [Record(SITE, rows=[1]), Record(f"{SITE}:q", rows=[0])]
    whole, split = run(records), run(records, batch_size=1)
    assert set(split) == set(whole) == {SITE, f"{SITE}:q"}
    for site, number in ((SITE, 1), (f"{SITE}:q", 0)):
        assert split[site].rows == whole[site].rows
        assert split[site].rows[0].prompt == PROMPTS[number]
        torch.testing.assert_close(split[site].tensor, whole[site].tensor, rtol=1e-4, atol=1e-5)


def test_second_order_schedulers_keep_every_evaluation() -> None:
    from diffusers import HeunDiscreteScheduler

    pipe = tiny.pipeline("sd")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    found = Reader(pipe).run(
        "a cat", record=SITE, seeds=0, output_type="latent", **tiny.arguments("sd", 3)
    )
    steps = [(each.step, each.evaluation) for each in found.cache[SITE].steps]
    assert steps == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert found.cache[SITE].select(step=1).shape[2] == 2


def test_too_much_is_refused_at_the_first_value() -> None:
    calls: list[int] = []
    handle = reader().subject.unet.conv_out.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(InvalidInput, match=r"3 steps of .* MiB need .* GiB are left; record fewer"):
        run(SITE, memory_limit=30_000)
    handle.remove()
    assert not calls
    assert run(SITE, memory_limit=10_000_000)[SITE].tensor.nbytes == 2 * 2 * 3 * 24 * 32 * 4


def test_recorded_memory_does_not_keep_the_batch_alive() -> None:
    """A part is a copy of its own, not a view of everything."""
    found = run(Record(SITE, tokens=0))[SITE].tensor
    assert found.untyped_storage().nbytes() == found.nbytes


def test_cache_is_a_mapping_with_globs() -> None:
    found = run([SITE, "unet.**.attn1:heads"])
    assert len(found) == 8 and SITE in found and list(found)[0] == SITE
    assert found[f"{SITE}:out"] is found[SITE]
    assert found["unet.**.attn2"] is found[SITE]
    assert len(found.matching("unet.up_blocks.**")) == 4
    assert found.get("unet.x") is None
    with pytest.raises(InvalidInput, match="matches 7 recorded sites .*name one, or use matching"):
        found["unet.**.attn1:heads"]
    with pytest.raises(UnknownName, match="unknown recorded site 'unet.mid_block'"):
        found["unet.mid_block"]
    half = found.to(torch.float16)
    assert half[SITE].tensor.dtype == torch.float16 and found[SITE].tensor.dtype == torch.float32
    assert found.select(branch="cond")[SITE].shape == (2, 3, 24, 32)


def test_reprs_print_shapes_and_escape_text() -> None:
    found = run(SITE)
    assert "[rows 2, branch 2, steps 3, tokens 24, features 32]" in repr(found)
    assert SITE in found._repr_html_() and "steps 0 .. 2 (3)" in repr(found[SITE])
    hostile = Activation("x<script>", torch.zeros(1, 1, 1, 1), (), ("cond",), ())
    assert "<script>" not in hostile._repr_html_() + Cache([hostile])._repr_html_()


def test_branches_of_different_length_say_so() -> None:
    pipe = tiny.pipeline("lumina2")
    site = "transformer.layers.0"
    kw = {"seeds": 0, "output_type": "latent", **tiny.arguments("lumina2", 1)}
    with pytest.raises(
        InvalidInput, match="branches have prompts of different length, record one with"
    ):
        Reader(pipe).run("a red cat", record=site, **kw)
    assert Reader(pipe).run("a red cat", record=Record(site, branch="uncond"), **kw).cache[
        site
    ].branches == ("uncond",)


def test_contexts_record_several_runs_as_rows() -> None:
    pipe = reader().subject
    kw = {"output_type": "latent", **tiny.arguments("sd", 2)}
    with reader().recording(SITE, branch="cond", dtype=torch.float16) as found:
        assert not found
        pipe("a red cat", **kw)
        pipe("a red dog", **kw)
    assert [row.prompt for row in found[SITE].rows] == ["a red cat", "a red dog"]
    assert found[SITE].shape == (2, 2, 24, 32) and found[SITE].tensor.dtype == torch.float16
    with (
        pytest.raises(InvalidInput, match="the runs in this block have different steps"),
        reader().recording(SITE),
    ):
        pipe("a red cat", **kw)
        pipe("a red dog", **{**kw, "num_inference_steps": 3})


@pytest.mark.parametrize(
    ("tokens", "second", "text"),
    [
        (None, {"height": 24, "width": 16}, r"different grids \(\(4, 6\) and \(6, 4\)\)"),
        (None, {"num_inference_steps": 3}, "different steps .step 0 at timestep .*and step 0"),
        (-1, {"height": 32, "width": 24}, r"keep different tokens \(\(23,\) and others\)"),
    ],
)
def test_runs_that_differ_are_recorded_apart(
    tokens: Any, second: dict[str, int], text: str
) -> None:
    pipe = reader().subject
    kw = {"output_type": "latent", **tiny.arguments("sd", 2)}
    with (
        pytest.raises(InvalidInput, match=f"{text}.*record them apart"),
        reader().recording(SITE, tokens=tokens, steps=slice(0, 2)),
    ):
        pipe("a red cat", **kw)
        pipe("a red dog", **{**kw, **second})


def test_a_shared_module_that_runs_twice_is_refused() -> None:
    with pytest.raises(InvalidInput, match="ran more than once at step 0 with the same rows"):
        run("unet.mid_block.resnets.0.nonlinearity")


def test_a_root_is_a_site() -> None:
    found = run(["unet", "unet:in", "text_encoder"])
    assert found["unet"].hw == (8, 12) and found["unet"].shape == (2, 2, 3, 96, 4)
    assert found["unet:in"].shape == (2, 2, 3, 96, 4)
    assert found["text_encoder"].shape == (2, 2, 1, 77, 16)
    # both branches get the same latents
    both = found["unet:in"].tensor
    assert torch.equal(both[:, 0], both[:, 1])
