"""Word heat maps against recorded probabilities and a loop that follows the definition."""

import gc
from functools import cache
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

import dreamreader as dr
from dreamreader.attention import WordMap, WordMaps, word_maps
from dreamreader.engine import Reader, Record
from dreamreader.errors import InvalidInput, NeverFired, UnknownName

PROMPTS = ["a red cat and a zebra", "a blue dog on a red tree"]
WORDS = [["red", "zebra"], ["dog", "red"]]


def pieces(tokenizer: Any, prompt: str) -> list[tuple[str, int]]:
    """(word, number) of every token of a prompt, start token counted where there is one.

    A token that is a space alone belongs to no word.
    """
    found = []
    first = tokenizer(prompt).input_ids
    start = 1 if first[0] in tokenizer.all_special_ids else 0
    for word in prompt.split():
        at = start + len(found)
        own = enumerate(tokenizer.tokenize(word))
        found += [("" if piece == "\u2581" else word, at + n) for n, piece in own]
    return found


def keys_of(pipe: Any, name: str, prompt: str) -> list[tuple[str, int]]:
    """(word, key) of every prompt token among all the keys of an attention."""
    if name in ("sd", "sdxl", "shapes-unet"):
        return pieces(pipe.tokenizer, prompt)
    if name == "flux":  # text first, of the T5 encoder
        return pieces(pipe.tokenizer_2, prompt)
    cells = 24 if name == "sd3" else 64
    clip = [(word, cells + at) for word, at in pieces(pipe.tokenizer, prompt)]
    if name == "shapes-dit":
        return clip
    return clip + [(word, cells + 77 + at) for word, at in pieces(pipe.tokenizer_3, prompt)]


# pipeline, sites, where the image queries are (None: all), grid of the maps
FAMILIES = [
    ("sd", "unet.**.attn2:probs", None, (8, 12)),
    ("sdxl", "unet.**.attn2:probs", None, (8, 12)),
    ("sd3", "transformer.transformer_blocks.*.attn:probs", slice(0, 24), (4, 6)),
    ("flux", "transformer.**.attn:probs", slice(16, 40), (4, 6)),
]


def definition(
    probs: list[Tensor],
    grids: list[tuple[int, int]],
    keys: list[tuple[str, int]],
    word: str,
    size: tuple[int, int],
    normalise: bool = False,
) -> Tensor:
    """One row's map: probs is [steps, queries, heads, keys] of every site."""
    tokens = [key for _, key in keys]
    everything = []
    for layer, grid in zip(probs, grids, strict=True):
        for head in range(layer.shape[2]):
            total = sum(layer[step, :, head] for step in range(len(layer)))
            maps = []
            for key in tokens:
                one = total[:, key].reshape(1, 1, *grid)
                one = F.interpolate(one, size=size, mode="bicubic")
                maps.append(one[0, 0].clamp(min=0))
            everything.append(torch.stack(maps))
    mean = torch.stack(everything).mean(0)  # [tokens, h, w]
    if normalise:
        mean = mean / (mean.sum(0) + 1e-6)
    own = [place for place, (each, _) in enumerate(keys) if each == word]
    return mean[own].mean(0)


@cache
def recorded(name: str) -> tuple[Any, dict[str, Any], Any]:
    pipe = dr.zoo.load_pipeline(name) if name.startswith("shapes") else tiny.pipeline(name)
    return pipe, settings(name), {}


def settings(name: str, steps: int = 3) -> dict[str, Any]:
    if name.startswith("shapes"):
        return dr.zoo.settings(num_inference_steps=steps, output_type="latent")
    return tiny.arguments(name, steps) | {"output_type": "latent"}


def by_definition(
    name: str,
    prompts: list[str],
    words: list[list[str]],
    sites: list[str],
    image: slice | None,
    size: tuple[int, int],
    normalise: bool = False,
) -> Tensor:
    """[rows, words, h, w] from recorded probabilities of every row."""
    pipe, kw, _ = recorded(name)
    records = [Record(site, branch="cond") for site in sites]
    cache = Reader(pipe).run(prompts, record=records, seeds=0, **kw).cache
    found = []
    for row, prompt in enumerate(prompts):
        probs = [each.tensor[row][:, image or slice(None)] for each in cache.values()]
        grids = [_grid(each.shape[1], size) for each in probs]
        keys = keys_of(pipe, name, prompt)
        maps = [definition(probs, grids, keys, each, size, normalise) for each in words[row]]
        found.append(torch.stack(maps))
    return torch.stack(found)


def _grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    while height * width > tokens:
        height, width = height // 2, width // 2
    assert height * width == tokens
    return height, width


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalise", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize(("name", "sites", "image", "size"), FAMILIES, ids=lambda x: str(x)[:6])
def test_maps_follow_the_definition(
    name: str, sites: str, image: slice | None, size: tuple[int, int], normalise: bool
) -> None:
    pipe, kw, _ = recorded(name)
    maps = word_maps(Reader(pipe), PROMPTS, WORDS, seeds=0, normalise=normalise, **kw)
    assert sorted(maps.sites) == sorted(Reader(pipe).sites(sites).names)
    assert maps.axes == ("rows", "words", "height", "width")
    expected = by_definition(name, PROMPTS, WORDS, list(maps.sites), image, size, normalise)
    close(maps.maps, expected)


SHAPES = ["a red circle on a white background", "a blue star at the top left"]


@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_maps_of_trained_models_follow_the_definition(name: str) -> None:
    pipe, kw, _ = recorded(name)
    words = [["red", "circle"], ["star", "left"]]
    maps = word_maps(Reader(pipe), SHAPES, words, seeds=0, **kw)
    unet = name == "shapes-unet"
    assert len(maps.sites) == 6 and not any("mid_block" in site for site in maps.sites)
    image, size = (None, (16, 16)) if unet else (slice(0, 64), (8, 8))
    close(maps.maps, by_definition(name, SHAPES, words, list(maps.sites), image, size))


def test_the_middle_block_of_latents_eight_times_finer_is_left_out() -> None:
    pipe, kw, _ = recorded("shapes-unet")
    reader = Reader(pipe)
    maps = word_maps(reader, SHAPES[0], "circle", seeds=0, skip_factor=None, **kw)
    assert [site for site in maps.sites if "mid_block" in site]
    close(
        maps.maps,
        by_definition("shapes-unet", SHAPES[:1], [["circle"]], list(maps.sites), None, (16, 16)),
    )
    with pytest.raises(NeverFired, match="skip_factor=8 leaves out unet.mid_block.*attn2:probs"):
        word_maps(reader, SHAPES[0], "circle", sites="unet.mid_block.**.attn2:probs", **kw)


@pytest.mark.parametrize("name", ["sd", "sd3", "lumina2"])
def test_a_row_is_the_same_alone_and_in_any_batch(name: str) -> None:
    pipe, reader = tiny.pipeline(name), None
    reader = Reader(pipe)
    kw = settings(name, 2)
    prompts, words = [*PROMPTS, "a red house"], [*WORDS, ["house"]]
    whole = word_maps(reader, prompts, words, seeds=[3, 4, 5], **kw)
    parts = word_maps(reader, prompts, words, seeds=[3, 4, 5], batch_size=2, **kw)
    torch.testing.assert_close(parts.maps, whole.maps, rtol=1e-3, atol=1e-5, equal_nan=True)
    assert parts.rows == whole.rows and parts.words == whole.words
    assert [(row.index, row.prompt, row.seed) for row in parts.rows] == [
        (number, prompt, 3 + number) for number, prompt in enumerate(prompts)
    ]
    assert whole.maps[2, 1].isnan().all() and whole.maps[2, 0].isfinite().all()
    for row in range(3):
        alone = word_maps(reader, prompts[row], words[row], seeds=3 + row, **kw)
        torch.testing.assert_close(
            alone.maps[0], whole.maps[row, : len(words[row])], rtol=1e-3, atol=1e-5
        )


def test_lumina2_reads_image_tokens_behind_prompts_of_different_length() -> None:
    pipe, kw = tiny.pipeline("lumina2"), settings("lumina2", 1)
    reader, words = Reader(pipe), [["red"], ["tree"]]
    maps = word_maps(reader, PROMPTS, words, seeds=0, **kw)
    assert maps.sites == ("transformer.layers.0.attn:probs", "transformer.layers.1.attn:probs")
    records = [Record(site, branch="cond") for site in maps.sites]
    cache = reader.run(PROMPTS, record=records, seeds=0, **kw).cache
    for row, prompt in enumerate(PROMPTS):
        keys = pipe.tokenizer(pipe.system_prompt + " <Prompt Start> " + prompt).input_ids
        names = pipe.tokenizer.convert_ids_to_tokens(keys)
        at = max(n for n, each in enumerate(names) if each.endswith(words[row][0]))
        probs = [each.tensor[row, 0, len(keys) : len(keys) + 24, :, at] for each in cache.values()]
        close(maps.maps[row, 0], torch.cat(probs, 1).mean(1).reshape(4, 6))


def test_several_seeds_of_one_prompt() -> None:
    pipe, kw, _ = recorded("sd")
    maps = word_maps(Reader(pipe), "a red cat", ["cat"], seeds=[0, 7], **kw)
    assert [row.seed for row in maps.rows] == [0, 7] and maps.maps.shape[0] == 2
    assert not torch.equal(maps.maps[0], maps.maps[1])


def test_every_word_of_the_prompt() -> None:
    pipe, kw, _ = recorded("sd")
    maps = word_maps(Reader(pipe), PROMPTS, seeds=0, **kw)
    assert maps.words == (
        ("a", "red", "cat", "and", "zebra"),
        ("a", "blue", "dog", "on", "red", "tree"),
    )
    expected = by_definition("sd", PROMPTS, [["a"], ["a"]], list(maps.sites), None, (8, 12))
    close(maps.of("A")[:, None], expected)


def test_steps_layers_and_heads_are_kept_apart_on_request() -> None:
    pipe, kw, _ = recorded("sd")
    reader = Reader(pipe)
    ask = {"words": "cat", "seeds": 0, "skip_factor": None, **kw}
    prompt = PROMPTS[0]
    whole = word_maps(reader, prompt, **ask)
    heads = word_maps(reader, prompt, per_head=True, **ask)
    layers = word_maps(reader, prompt, per_layer=True, **ask)
    assert heads.axes == ("rows", "words", "heads", "height", "width")
    assert len(heads.heads) == heads.maps.shape[2] and heads.heads[1] == (heads.sites[0], 1)
    close(heads.maps.mean(2), whole.maps)
    assert layers.axes[2] == "layers" and layers.maps.shape[2] == len(layers.sites)
    own = [n for n, (site, _) in enumerate(heads.heads) if site == layers.sites[2]]
    close(heads.maps[:, :, own].mean(2), layers.maps[:, :, 2])
    steps = word_maps(reader, prompt, per_step=True, per_layer=True, **ask)
    assert steps.axes[2:4] == ("steps", "layers") and steps.steps == (0, 1, 2)
    second = word_maps(reader, prompt, steps=1, per_layer=True, **ask)
    close(steps.maps[:, :, 1], second.maps)
    fine = [n for n, site in enumerate(steps.sites) if "up_blocks.1" in site]
    close(steps.maps[:, :, :, fine].sum(2), layers.maps[:, :, fine])  # full size: nothing clamped
    early = word_maps(reader, prompt, timesteps=lambda t: t > 500, per_layer=True, **ask)
    assert early.steps == (0,)
    close(early.maps, steps.maps[:, :, 0])


def test_size_of_the_maps() -> None:
    pipe, kw, _ = recorded("sd")
    maps = word_maps(Reader(pipe), PROMPTS, WORDS, seeds=0, size=(16, 24), **kw)
    close(maps.maps, by_definition("sd", PROMPTS, WORDS, list(maps.sites), None, (16, 24)))


def test_no_processor_is_replaced() -> None:
    pipe = tiny.pipeline("sd")
    before = dict(pipe.unet.attn_processors)
    during: list[dict] = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        during.append(dict(pipe.unet.attn_processors))
        return tensors

    hooks = sum(len(each._forward_hooks) for each in pipe.unet.modules())
    kw = settings("sd", 2)
    word_maps(Reader(pipe), "a cat", "cat", seeds=0, callback_on_step_end=look, **kw)
    for seen in [*during, dict(pipe.unet.attn_processors)]:
        assert seen.keys() == before.keys()
        assert all(seen[name] is before[name] for name in before)
    assert len(during) == 2
    assert hooks == sum(len(each._forward_hooks) for each in pipe.unet.modules())


def test_pictures_are_those_of_a_plain_run() -> None:
    pipe, kw, _ = recorded("sd")
    plain = Reader(pipe).run(PROMPTS, seeds=0, **kw).images
    assert torch.equal(word_maps(Reader(pipe), PROMPTS, seeds=0, **kw).images, plain)


def test_memory_does_not_grow_with_the_steps() -> None:
    pipe = tiny.pipeline("sd")
    held: dict[int, int] = {}

    def run(steps: int) -> None:
        def count(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            if step == steps - 1:
                gc.collect()
                kinds = (Tensor, torch.nn.Parameter)  # others, such as fake ones, hold no memory
                live = [each for each in gc.get_objects() if type(each) in kinds]
                sizes = {each.untyped_storage().data_ptr(): each.nbytes for each in live}
                held[steps] = sum(sizes.values())
            return tensors

        kw = settings("sd", steps)
        word_maps(Reader(pipe), PROMPTS, seeds=0, callback_on_step_end=count, **kw)

    run(3)
    run(3)
    once = held[3]
    run(12)
    assert held[12] <= once + 4096  # a scheduler's own table is longer


@pytest.mark.parametrize("size", ["max", "auto"])
def test_attention_slicing(size: str) -> None:
    pipe, kw = tiny.pipeline("sd"), settings("sd")
    expected = word_maps(Reader(pipe), PROMPTS, WORDS, seeds=0, **kw)
    pipe.enable_attention_slicing(size)
    found = word_maps(Reader(pipe), PROMPTS, WORDS, seeds=0, **kw)
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-3, atol=1e-5)


def test_eager_processors() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    pipe, kw = tiny.pipeline("sd"), settings("sd")
    expected = word_maps(Reader(pipe), PROMPTS, WORDS, seeds=0, **kw)
    pipe.unet.set_attn_processor(AttnProcessor())
    found = word_maps(Reader(pipe), PROMPTS, WORDS, seeds=0, **kw)
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-3, atol=1e-5)


def test_a_compiled_denoiser_runs_uncompiled_and_says_so() -> None:
    pipe, kw = tiny.pipeline("sd"), settings("sd", 2)
    expected = word_maps(Reader(pipe), "a cat", "cat", seeds=0, **kw)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    found = word_maps(Reader(pipe), "a cat", "cat", seeds=0, **kw)
    assert found.sites == expected.sites
    close(found.maps, expected.maps)
    assert found.firing is not None and "ran uncompiled" in found.firing.notes[0]


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.05), (torch.float64, 1e-4)])
def test_other_dtypes(dtype: torch.dtype, error: float) -> None:
    pipe, kw = tiny.pipeline("sd3"), settings("sd3", 2)
    latents = torch.randn(2, 4, 8, 12)
    expected = word_maps(Reader(pipe), PROMPTS, WORDS, latents=latents, **kw)
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        part.to(dtype)
    found = word_maps(Reader(pipe), PROMPTS, WORDS, latents=latents.to(dtype), **kw)
    assert found.maps.dtype == torch.float32
    torch.testing.assert_close(found.maps, expected.maps, rtol=error, atol=1e-3 * error)


def test_maps_of_an_edited_run() -> None:
    pipe, kw = tiny.pipeline("sd"), settings("sd")
    reader = Reader(pipe)
    flat = dr.Scale("unet.**.attn2:q", 0.0, branch="cond")
    maps = word_maps(reader, PROMPTS, WORDS, edits=flat, seeds=0, **kw)
    close(maps.maps, torch.full_like(maps.maps, 3 / 77))  # 3 steps, all keys alike
    collector = WordMap(reader, WORDS)
    result = reader.run(PROMPTS, edits=flat, record=collector.requests(), seeds=0, **kw)
    found = collector.result()
    assert torch.equal(found.maps, maps.maps) and found.images is None
    assert {line.kind for line in result.firing if line.site in found.sites} == {"record"}


def test_collecting_while_the_caller_runs_the_pipeline() -> None:
    pipe, kw = tiny.pipeline("sd"), settings("sd", 2)
    reader = Reader(pipe)
    collector = WordMap(reader)
    with reader.recording(collector.requests()):
        for prompt in ("a red cat", "a dog"):
            pipe(prompt, generator=torch.Generator().manual_seed(0), **kw)
    found = collector.result()
    assert found.words == (("a", "red", "cat"), ("a", "dog"))
    assert found.maps.shape[:2] == (2, 3)
    for row, prompt in enumerate(("a red cat", "a dog")):
        alone = word_maps(reader, prompt, seeds=0, **kw)
        close(found.maps[row, : len(found.words[row])], alone.maps[0])


def test_edits_of_heads_act_on_the_input_of_the_output_projection() -> None:
    pipe, kw = tiny.pipeline("sd"), settings("sd", 1)
    reader, site = Reader(pipe), "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    before, plain = reader.run_with_cache(PROMPTS, [site, f"{site}:heads"], seeds=0, **kw)
    edits = {
        "scale": dr.Scale(f"{site}:heads", 3.0, heads=[1], branch="cond"),
        "ablate": dr.Ablate(f"{site}:heads", "zero", heads=[0], branch="cond"),
        "patch": dr.Patch(f"{site}:heads", [1, 0], heads=[1], branch="cond"),
    }
    heads = plain[f"{site}:heads"].select(branch="cond").tensor[:, 0].clone()
    for kind, edit in edits.items():
        changed = heads.clone()
        if kind == "scale":
            changed[:, :, 1] *= 3
        elif kind == "ablate":
            changed[:, :, 0] = 0
        else:
            changed[:, :, 1] = heads[[1, 0], :, 1]
        result = reader.run(PROMPTS, edits=edit, record=site, seeds=0, **kw)
        linear = module.to_out[0]
        expected = F.linear(changed.flatten(-2), linear.weight, linear.bias)
        expected = expected / module.rescale_output_factor
        got = result.cache[site].select(branch="cond").tensor[:, 0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        old = plain[site].select(branch="uncond").tensor
        torch.testing.assert_close(result.cache[site].select(branch="uncond").tensor, old)


def test_a_word_that_is_not_there() -> None:
    reader, kw = Reader(tiny.pipeline("sd")), settings("sd", 1)
    text = r"the word 'bird' is not in the prompt of row 1, 'a blue dog on a red tree'"
    with pytest.raises(InvalidInput, match=text):
        word_maps(reader, PROMPTS, [["cat"], ["bird"]], **kw)
    collector = WordMap(reader, [["cat"], ["bird"]])
    with pytest.raises(InvalidInput, match=text):
        reader.run(PROMPTS, record=collector.requests(), seeds=0, batch_size=1, **kw)
    long = " ".join(["red"] * 100) + " bird"
    with pytest.raises(InvalidInput, match=r"or the text encoder cuts it off"):
        word_maps(reader, long, "bird", **kw)
    assert word_maps(reader, long, seeds=0, **kw).words == (("red",),)


def test_bad_arguments_say_why() -> None:
    reader, kw = Reader(tiny.pipeline("sd")), settings("sd", 1)
    with pytest.raises(InvalidInput, match="words has 3 lists, there are 2 prompts"):
        word_maps(reader, PROMPTS, [["a"], ["a"], ["a"]], **kw)
    with pytest.raises(InvalidInput, match="words is empty"):
        word_maps(reader, PROMPTS, [], **kw)
    with pytest.raises(InvalidInput, match="words must be words of the prompt, got ' '"):
        word_maps(reader, PROMPTS, " ", **kw)
    with pytest.raises(InvalidInput, match="words must be words of the prompt, got 3"):
        word_maps(reader, PROMPTS, [["a"], [3]], **kw)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="per_layer and per_head: give one"):
        WordMap(reader, per_layer=True, per_head=True)
    with pytest.raises(InvalidInput, match=r"of one branch, got \('cond', 'uncond'\)"):
        WordMap(reader, branch=("cond", "uncond"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="size is .* got 0"):
        WordMap(reader, size=0)
    with pytest.raises(InvalidInput, match="attn1:probs: its .* keys hold no text tokens"):
        word_maps(reader, "a cat", sites="unet.up_blocks.1.**.attn1:probs", **kw)
    with pytest.raises(NeverFired, match="word maps: nothing ran"):
        WordMap(reader).result()
    model, tokenizer = tiny.language_model("gpt2")
    with pytest.raises(InvalidInput, match="GPT2LMHeadModel has no unet or transformer"):
        WordMap(Reader(model, tokenizer))
    with pytest.raises(InvalidInput, match="row 0: the prompt '' has no words"):
        word_maps(reader, ["", "a cat"], seeds=0, **kw)


def made(words: int = 2) -> WordMaps:
    maps = torch.rand(2, words, 8, 8)
    rows = (dr.engine.Row(0, "a <b>cat</b>", 3), dr.engine.Row(1, "a Dog", 4))
    own = (("cat", "a"), ("Dog", "a"))
    axes = ("rows", "words", "height", "width")
    return WordMaps(maps, axes, rows, own, ("unet.attn2:probs",), (), (0, 1))


def test_a_word_of_every_row() -> None:
    maps = made()
    assert torch.equal(maps.of("a"), maps.maps[:, 1])
    with pytest.raises(UnknownName, match=r"unknown word 'cat'.*Row 1: 'a Dog'"):
        maps.of("cat")


def test_upsampling_is_bicubic_and_never_negative() -> None:
    maps = made()
    maps.maps[0, 0] = 0
    maps.maps[0, 0, 3, 3] = 1
    found = maps.upsampled(32)
    expected = F.interpolate(maps.maps, (32, 32), mode="bicubic").clamp(min=0)
    torch.testing.assert_close(found.maps, expected)
    assert found.size == (32, 32) and float(found.maps.min()) == 0


def test_overlay_colours_the_picture_where_attention_is() -> None:
    from PIL import Image

    maps = made()
    maps.maps[0, 0] = 0
    maps.maps[0, 0, :4] = 1
    blue = [Image.new("RGB", (32, 32), (0, 0, 255))] * 2
    rows = maps.overlay(blue)
    assert [len(row) for row in rows] == [2, 2]
    assert rows[0][0].getpixel((16, 31)) == (0, 0, 255)
    assert rows[0][0].getpixel((16, 2)) != (0, 0, 255)
    tensor = torch.zeros(2, 3, 32, 32)
    tensor[:, 2] = 1
    assert maps.overlay(tensor, ["a"])[1][0].tobytes() == rows[1][1].tobytes()
    with pytest.raises(InvalidInput, match="2 pictures are needed, got none"):
        maps.overlay()
    with pytest.raises(InvalidInput, match="2 pictures are needed, got 1"):
        maps.overlay(blue[:1])


def test_what_people_see() -> None:
    from dataclasses import replace

    maps = made()
    assert repr(maps).splitlines() == [
        "WordMaps [rows 2, words 2, height 8, width 8] of 1 sites, 2 steps",
        "row 0 (seed 3): cat, a",
        "row 1 (seed 4): Dog, a",
    ]
    page = maps._repr_html_()
    assert page.count("<img") == 4 and "a &lt;b&gt;cat&lt;/b&gt;" in page and "<b>" not in page
    pictures = replace(maps, images=torch.rand(2, 3, 16, 16))._repr_html_()
    assert pictures.count("<img") == 4 and pictures != page
