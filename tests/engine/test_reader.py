"""The Reader: rows, seeds, batches, hooks, sites and what it leaves behind."""

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from dreamreader.edits import Steer
from dreamreader.engine import FiringReport, Reader, SiteList
from dreamreader.engine._firing import Firing
from dreamreader.engine._pattern import Pattern, parse
from dreamreader.engine._rows import plan_rows
from dreamreader.errors import InvalidInput, NeverFired, UnknownName

SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
V = torch.ones(32)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(tiny.pipeline("sd"))


def run(reader: Reader, prompts: Any = "a red cat", **kw: Any) -> Any:
    return reader.run(prompts, **{"output_type": "latent", **tiny.arguments("sd", 2), **kw})


@pytest.mark.parametrize(
    ("prompts", "seeds", "expected"),
    [
        ("a", 5, [("a", 5)]),
        (["a", "b", "c"], 5, [("a", 5), ("b", 6), ("c", 7)]),
        ("a", [1, 2], [("a", 1), ("a", 2)]),
        (["a", "b"], [4], [("a", 4), ("b", 4)]),
        (["a", "b"], range(2), [("a", 0), ("b", 1)]),
    ],
)
def test_rows(prompts: Any, seeds: Any, expected: Any) -> None:
    plan = plan_rows(prompts, seeds, [])
    assert list(zip(plan.prompts, plan.seeds, strict=True)) == expected


def test_a_sweep_over_strengths_keeps_prompt_and_seed(reader: Reader) -> None:
    result = run(reader, edits=Steer(SITE, V, [0.0, 1.0, 2.0]), seeds=7)
    assert [(row.prompt, row.seed) for row in result.rows] == [("a red cat", 7)] * 3
    alone = run(reader, edits=Steer(SITE, V, 2.0), seeds=7)
    torch.testing.assert_close(result.images[2], alone.images[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(result.images[0], run(reader, ["a red cat"] * 3, seeds=[7] * 3).images[0])


def test_without_seeds_one_is_drawn_and_told(reader: Reader) -> None:
    state = torch.get_rng_state()
    one, other = run(reader), run(reader)
    assert one.rows[0].seed != other.rows[0].seed
    again = run(reader, seeds=one.rows[0].seed)
    assert torch.equal(again.images, one.images)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"


@pytest.mark.parametrize("name", ["sd", "flux", "pixart-sigma"])
def test_a_row_does_not_depend_on_the_batch_around_it(name: str) -> None:
    reader = Reader(tiny.pipeline(name))
    kw = {"output_type": "latent", **tiny.arguments(name, 2)}
    prompts = ["a red cat", "a dog", "two trees"]
    whole = reader.run(prompts, seeds=3, **kw).images
    split = reader.run(prompts, seeds=3, batch_size=2, **kw).images
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-4)
    alone = reader.run(prompts[1], seeds=4, **kw).images
    torch.testing.assert_close(alone[0], whole[1], rtol=1e-4, atol=1e-4)


def test_noise_of_stochastic_schedulers_is_per_row(reader: Reader) -> None:
    from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler

    pipe = tiny.pipeline("sd")
    for scheduler in (DDPMScheduler, EulerAncestralDiscreteScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        whole = run(Reader(pipe), ["a cat", "a dog"], seeds=1).images
        split = run(Reader(pipe), ["a cat", "a dog"], seeds=1, batch_size=1).images
        torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-3)


def test_other_prompts_are_split_with_their_rows(reader: Reader) -> None:
    kw = {"negative_prompt": ["red", "a dog", "blue"], "seeds": 0}
    whole = run(reader, ["a", "b", "c"], **kw).images
    split = run(reader, ["a", "b", "c"], batch_size=2, **kw).images
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-4)
    one = run(reader, ["a", "b"], negative_prompt="red", seeds=0).images
    torch.testing.assert_close(one[0], whole[0], rtol=1e-4, atol=1e-4)


def test_pictures_come_in_the_form_asked_for(reader: Reader) -> None:
    from PIL import Image

    pictures = run(reader, ["a", "b", "c"], seeds=0, output_type="pil", batch_size=2).images
    assert len(pictures) == 3 and isinstance(pictures[0], Image.Image)
    arrays = run(reader, ["a", "b", "c"], seeds=0, output_type="np", batch_size=2).images
    assert arrays.shape == (3, 16, 24, 3)


def test_run_with_cache_gives_pictures_and_cache(reader: Reader) -> None:
    kw = {"output_type": "latent", **tiny.arguments("sd", 2)}
    images, cache = reader.run_with_cache("a red cat", sites=[SITE], seeds=0, **kw)
    assert images.shape == (1, 4, 8, 12) and list(cache) == [SITE]


def test_run_with_hooks_changes_and_watches(reader: Reader) -> None:
    seen: list[Tensor] = []
    kw = {"output_type": "latent", "seeds": 0, **tiny.arguments("sd", 2)}

    def watch(x: Tensor) -> None:
        seen.append(x)

    plain = reader.run_with_hooks("a red cat", [(SITE, watch)], **kw)
    assert [each.shape for each in seen] == [(2, 24, 32)] * 2
    steered = reader.run_with_hooks("a red cat", [(SITE, lambda x: x + V)], **kw)
    assert torch.equal(plain, run(reader, seeds=0).images)
    torch.testing.assert_close(steered, run(reader, edits=Steer(SITE, V), seeds=0).images)


def test_editing_block_reports_and_ends(reader: Reader) -> None:
    pipe = reader.subject
    kw = {"output_type": "latent", **tiny.arguments("sd", 2)}

    def call() -> Tensor:
        return pipe(["a cat"] * 2, generator=torch.Generator().manual_seed(0), **kw).images

    plain = call()
    with reader.editing(Steer(SITE, V, [0.0, 3.0])) as report:
        edited = call()
    assert torch.equal(edited[0], plain[0]) and not torch.equal(edited[1], plain[1])
    assert report[0].rows == {1} and dict(report[0].steps) == {0: 1, 1: 1}
    assert torch.equal(call(), plain)
    with (
        pytest.raises(InvalidInput, match="alpha at .*: has 3 values, the run has 2 rows"),
        reader.editing(Steer(SITE, V, [0.0, 3.0, 1.0])),
    ):
        call()


def test_several_pictures_per_prompt_are_rows_of_a_block(reader: Reader) -> None:
    kw = {"output_type": "latent", "num_images_per_prompt": 2, **tiny.arguments("sd", 2)}
    with reader.editing(Steer(SITE, V, rows=3)) as report, reader.recording(SITE) as cache:
        reader.subject(["a cat", "a dog"], **kw)
    assert report[0].rows == {3}
    assert [row.prompt for row in cache[SITE].rows] == ["a cat", "a cat", "a dog", "a dog"]


def test_sites_print_and_learn_their_shapes(reader: Reader) -> None:
    found = reader.sites("unet.**.attn2:heads")
    assert isinstance(found, SiteList) and len(found) == 7
    assert found[0].heads == 2 and found[0].module_class == "Attention"
    run(reader, record="unet.**.attn2:heads", seeds=0)
    found = reader.sites("unet.mid_block.**.attn2:heads")
    assert found[0].shape == (2, 24, 32)
    assert "2x24x32" in repr(found) and "attn2:heads" in found._repr_html_()
    assert isinstance(found[:1], SiteList)
    assert "probs" in found[0].ports


@pytest.mark.parametrize(
    ("glob", "path", "hit"),
    [
        ("unet.*", "unet.conv_in", True),
        ("unet.*", "unet.mid_block.resnets", False),
        ("unet.**", "unet.mid_block.resnets", True),
        ("unet.**.attn2", "unet.attn2", True),
        ("unet.**.attn2", "unet.mid_block.x.attn2", True),
        ("unet.**.attn2", "unet.mid_block.xattn2", False),
        ("**.[01].attn1", "unet.a.1.attn1", True),
        ("**.[01].attn1", "unet.a.2.attn1", False),
        ("unet.up_blocks.?.attn*", "unet.up_blocks.1.attn2", True),
        ("unet.a+b", "unet.aab", False),
    ],
)
def test_globs_match_whole_parts(glob: str, path: str, hit: bool) -> None:
    assert Pattern(glob).matches(path) is hit


def test_site_strings() -> None:
    assert parse("a.b") == Pattern("a.b", "out", None)
    assert parse("a.b:heads.text") == Pattern("a.b", "heads", "text")
    for text, error, said in [
        ("a.b:head", UnknownName, "unknown port 'head'; nearest: heads"),
        ("a.b:q.txt", UnknownName, "unknown stream 'txt'; nearest: text"),
        ("a..b", InvalidInput, "empty part"),
        (":q", InvalidInput, "empty part"),
        (3, InvalidInput, "a site is a string"),
    ]:
        with pytest.raises(error, match=said):
            parse(text)  # type: ignore[arg-type]


def test_reprs(reader: Reader) -> None:
    assert repr(reader).startswith("Reader of StableDiffusionPipeline: vae (AutoencoderKL)")
    assert "<table" in reader._repr_html_()
    result = run(reader, "a <b>cat</b>", edits=Steer(SITE, V), record=SITE, seeds=0)
    assert "RunResult of 1 rows" in repr(result) and "0-1" in repr(result)
    assert "&lt;b&gt;cat" in result._repr_html_() and "<b>cat" not in result._repr_html_()


def test_nothing_is_kept_alive_by_cycles() -> None:
    pipe = tiny.pipeline("sd")
    gc.collect()
    gc.disable()
    try:
        reader = Reader(pipe)
        edit = Steer(SITE, torch.ones(32))
        result = run(reader, edits=edit, record=SITE, seeds=0)
        refs = [weakref.ref(each) for each in (edit, result, result.cache, reader)]
        values = weakref.ref(result.cache[SITE].tensor)
        del edit, result, reader
        assert [ref() for ref in refs] == [None] * 4 and values() is None
    finally:
        gc.enable()


def test_a_network_is_freed_with_its_reader() -> None:
    gc.collect()
    gc.disable()
    try:
        net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        reader = Reader(net)
        with reader.editing(Steer("0", torch.ones(4))), reader.recording("0"):
            net(torch.ones(1, 4))
        alive = weakref.ref(net[0])
        del net, reader
        assert alive() is None
    finally:
        gc.enable()


def test_the_subject_is_bit_equal_afterwards() -> None:
    pipe = tiny.pipeline("flux")
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    kw = {"output_type": "latent", **tiny.arguments("flux", 2)}
    pipe("a cat", **kw)  # the pipeline itself adds a registry of hooks in its first call
    own = type(pipe), set(vars(pipe.transformer))
    Reader(pipe).run(
        "a cat",
        edits=Steer("transformer.**.attn:heads", V),
        record="transformer.**.attn:probs",
        seeds=0,
        **kw,
    )
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (type(pipe), set(vars(pipe.transformer))) == own


def test_one_of_several_sites_that_are_named_never_runs() -> None:
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    reader, x = Reader(net), torch.ones(1, 2, 4)
    for request in (Steer(["a", "b"], torch.ones(4)), Steer(["b", "a"], torch.ones(4))):
        with pytest.raises(NeverFired, match="never fired at b: "), reader.editing(request):
            net["a"](x)
    with pytest.raises(NeverFired, match="never fired at b: "), reader.recording(["a", "b"]):
        net["a"](x)
    with reader.editing(Steer("*", torch.ones(4))):  # of a pattern one is enough
        net["a"](x)


def test_a_block_serves_one_with() -> None:
    net, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.ones(1, 2, 4)
    reader = Reader(net)
    block = reader.editing(Steer("0", torch.ones(4)))
    with block:
        torch.testing.assert_close(net(x), net[0].forward(x) + 1)
    with pytest.raises(InvalidInput, match=r"block of editing was .*call reader.editing\(...\) a"):
        with block:
            pass
    recording = reader.recording("0")
    with recording as cache:
        with pytest.raises(InvalidInput, match="block of recording was entered before"):
            recording.__enter__()
        net(x)
    assert len(cache) == 1  # the one that runs goes on

    @reader.editing(Steer("0", torch.ones(4)))
    def edited() -> Tensor:
        return net(x)

    assert torch.equal(edited(), edited())  # a block for each call
    torch.testing.assert_close(edited(), net(x) + 1)


def test_a_merged_report_adds_everything_up() -> None:
    def report(steps: list[int], skipped: list[int], row: int, note: str) -> FiringReport:
        line = Firing(
            "Steer(a)", "edit", "a", 0, len(steps), Counter(steps), Counter(cond=2), {row},
            passed_over=1, missed=2, not_computed=Counter(skipped), notes=[note, "both"],
        )  # fmt: skip
        return FiringReport([line], ["whole", note])

    merged = report([0, 1], [2], 0, "one")
    merged.merge(report([1], [2, 3], 1, "two"))
    merged.merge(FiringReport([Firing("Steer(b)", "edit", "b", 1, calls=4)]))
    (line,) = merged.of("a")
    assert (line.calls, line.passed_over, line.missed, line.rows) == (3, 2, 4, {0, 1})
    assert line.steps == {0: 1, 1: 2} and line.branches == {"cond": 4}
    assert line.not_computed == {2: 2, 3: 1}
    assert line.notes == ["one", "both", "two"] and merged.notes == ["whole", "one", "two"]
    assert "not computed at steps 2-3 (step cache)" in repr(merged)
    assert [each.calls for each in merged.of("b")] == [4]
