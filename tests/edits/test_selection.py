"""Where edits apply: steps, noise levels, branches, tokens, words and boxes."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from dreamreader.edits import Ablate, Box, Steer
from dreamreader.engine import Activation, Reader, Record
from dreamreader.engine._words import word_positions
from dreamreader.errors import ClockUnknown, InvalidInput, NeverFired, UnknownName

SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
KEYS = f"{SITE}:k"
ONES = torch.ones(32)
STEPS = 4
FLUX = "transformer_blocks.0"


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(tiny.pipeline("sd"))


@pytest.fixture(scope="module")
def flux() -> Reader:
    return Reader(tiny.pipeline("flux"))


def same_length(flux: Reader, site: str, **selection: Any) -> Activation:
    """What is recorded at a site where 24 text tokens meet 24 of the image."""
    kw = {**tiny.arguments("flux", 1), "max_sequence_length": 24, "output_type": "latent"}
    record = Record(site, **selection)
    return flux.run("a red cat", record=record, seeds=0, **kw).cache[site]


def run(reader: Reader, edits: Any, record: Any = (), prompts: Any = "a red cat", **kw: Any) -> Any:
    arguments = {"seeds": 0, "output_type": "latent", **tiny.arguments("sd", STEPS), **kw}
    return reader.run(prompts, edits=edits, record=record, **arguments)


def fired(reader: Reader, **selection: Any) -> list[int]:
    return sorted(run(reader, Steer(SITE, ONES, **selection)).firing[0].steps)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (0, [0]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        (slice(-2, None), [2, 3]),
        (range(0, 4, 2), [0, 2]),
        ({1, 3}, [1, 3]),
        ([0, -1], [0, 3]),
        (lambda step: step % 2 == 1, [1, 3]),
    ],
)
def test_steps(reader: Reader, steps: Any, expected: list[int]) -> None:
    assert fired(reader, steps=steps) == expected


def test_timesteps_sigmas_and_fraction(reader: Reader) -> None:
    moments = run(reader, (), record=SITE).cache[SITE].steps
    second = moments[1]
    assert fired(reader, timesteps=second.timestep) == [1]
    assert fired(reader, timesteps={second.timestep, moments[3].timestep}) == [1, 3]
    assert fired(reader, sigmas=(second.sigma, moments[0].sigma)) == [0, 1]
    assert fired(reader, sigmas=lambda sigma: sigma < second.sigma) == [2, 3]
    assert fired(reader, fraction=slice(0.5, None)) == [2, 3]
    assert fired(reader, fraction=(0.0, 0.5)) == [0, 1, 2]
    assert fired(reader, fraction=(0.0, 0.5), steps=slice(1, None)) == [1, 2]


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_one_branch_leaves_the_other_bit_equal_at_the_site(reader: Reader, branch: str) -> None:
    plain = run(reader, (), record=SITE).cache[SITE]
    edited = run(reader, Steer(SITE, ONES, branch=branch), record=SITE).cache[SITE]
    first = {b: plain.select(branch=b, step=0).tensor for b in plain.branches}
    for name, values in first.items():
        now = edited.select(branch=name, step=0).tensor
        torch.testing.assert_close(now, values + 1 if name == branch else values, rtol=0, atol=1e-6)


def _touched(reader: Reader, site: str, **kw: Any) -> Tensor:
    """[tokens] bool: which tokens of the conditional row an edit with ones changed in step 0."""
    prompts = kw.pop("prompts", "a red cat")
    record = Record(site, branch="cond", steps=0)
    plain = run(reader, (), record=record, prompts=prompts).cache[site].tensor
    edit = Steer(site, torch.ones(plain.shape[3:].numel()), branch="cond", steps=0, **kw)
    after = run(reader, edit, record=record, prompts=prompts).cache[site].tensor
    change = (after - plain)[:, 0].flatten(2)
    return (change != 0).all(-1).squeeze(0)


def test_tokens_by_index_slice_and_mask(reader: Reader) -> None:
    assert _touched(reader, SITE, tokens=3).nonzero().flatten().tolist() == [3]
    assert _touched(reader, SITE, tokens=[0, -1]).nonzero().flatten().tolist() == [0, 23]
    assert _touched(reader, SITE, tokens=slice(4, 6)).nonzero().flatten().tolist() == [4, 5]
    mask = torch.zeros(24, dtype=torch.bool)
    mask[7] = True
    assert torch.equal(_touched(reader, SITE, tokens=mask), mask)


def test_a_box_in_the_picture(reader: Reader) -> None:
    touched = _touched(reader, SITE, tokens=Box(0, 0, 0.5, 0.5)).reshape(4, 6)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:2, :3] = True
    assert torch.equal(touched, expected)
    # the same box on the finer grid of an outer block
    outer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    touched = _touched(reader, outer, tokens=Box(0.5, 0, 1, 0.5)).reshape(8, 12)
    assert touched[:4, 6:].all() and touched.sum() == 24


def test_a_mask_of_the_picture(reader: Reader) -> None:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 2:4] = True
    assert torch.equal(_touched(reader, SITE, tokens=mask), mask.flatten())
    found = run(reader, (), record=SITE).cache[SITE]
    assert found.select(tokens=mask).tokens == (8, 9)
    with pytest.raises(InvalidInput, match=r"tokens: a mask \[24\] is needed, got \[6, 4\]"):
        found.select(tokens=mask.reshape(6, 4))


def test_a_soft_mask_scales_the_strength(reader: Reader) -> None:
    mask = torch.linspace(0, 1, 24)
    plain = run(reader, (), record=Record(SITE, steps=0)).cache[SITE].tensor
    after = run(reader, Steer(SITE, ONES, 2.0, tokens=mask), record=Record(SITE, steps=0)).cache[
        SITE
    ]
    expected = (2 * mask)[:, None].expand(24, 32)
    torch.testing.assert_close((after.tensor - plain)[0, 0, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_word_of_the_prompt(reader: Reader) -> None:
    # begin, a, red, and cat in two pieces: c, at
    assert _touched(reader, KEYS, tokens="red").nonzero().flatten().tolist() == [2]
    assert _touched(reader, KEYS, tokens="cat").nonzero().flatten().tolist() == [3, 4]
    rows = run(
        reader,
        (),
        record=Record(KEYS, tokens="red", branch="cond"),
        prompts=["a red cat", "red dog"],
    ).cache[KEYS]
    whole = run(reader, (), record=KEYS, prompts=["a red cat", "red dog"]).cache[KEYS]
    whole = whole.select(branch="cond").tensor
    assert torch.equal(rows.tensor[0, :, 0], whole[0, :, 2])
    assert torch.equal(rows.tensor[1, :, 0], whole[1, :, 1])


def test_a_word_of_several_tokens(reader: Reader) -> None:
    tokenizer = reader.subject.tokenizer
    ids = tokenizer("a zebra and a red zebra").input_ids
    hits = word_positions(tokenizer, ids, "zebra")
    assert tokenizer.decode([ids[at] for at in hits]).replace(" ", "") == "zebrazebra"
    assert word_positions(tokenizer, ids, "zeb") == []
    assert word_positions(tokenizer, tokenizer("red cat").input_ids, "Red") == [1]


@pytest.mark.parametrize(
    ("name", "site", "first"),
    [
        ("sd3", "transformer.transformer_blocks.0.attn:k.text", [2, 78]),
        ("flux", "transformer.single_transformer_blocks.0.attn:k.text", [1]),
        ("qwen-image", "transformer.transformer_blocks.0.attn:k.text", [1]),
        ("aura-flow", "transformer.joint_transformer_blocks.0.attn:k.text", [9]),
        ("sana", "transformer.transformer_blocks.0.attn2:k", [2]),
        ("sd", "text_encoder.encoder.layers.0.self_attn:k", [2]),
    ],
)
def test_words_in_every_text_stream(name: str, site: str, first: list[int]) -> None:
    """Templates, registers and other encoders in front of the prompt are counted."""
    pipe = tiny.pipeline(name)
    reader, kw = Reader(pipe), tiny.arguments(name, 2)
    records = [Record(site, tokens="red", branch="cond")]
    cache = reader.run("a red cat", record=records, seeds=0, output_type="latent", **kw).cache
    assert list(cache[site].tokens or ()) == first


def test_a_word_that_a_prompt_lacks_is_an_error(reader: Reader) -> None:
    with pytest.raises(
        InvalidInput, match="word 'blue' is not in the prompt of row 1: 'a red cat'"
    ):
        run(reader, Steer(KEYS, ONES, tokens="blue"), prompts=["a blue cat", "a red cat"])


@pytest.mark.parametrize("site", [SITE, f"{SITE}:heads", f"{SITE}:probs", "unet.conv_in"])
def test_a_word_needs_text_tokens(reader: Reader, site: str) -> None:
    with pytest.raises(InvalidInput, match="a word needs text tokens, the .* tokens here are imag"):
        run(reader, (), record=Record(site, tokens="red"))


def test_a_word_is_in_no_image_stream() -> None:
    """Of a joint sequence that starts with the image, a word is among the text behind it."""
    reader, kw = Reader(tiny.pipeline("sd3")), tiny.arguments("sd3", 1)
    attention = "transformer.transformer_blocks.0.attn"

    def tokens(site: str) -> tuple[int, ...] | None:
        record = Record(site, tokens="red", branch="cond")
        found = reader.run("a red cat", record=record, seeds=0, output_type="latent", **kw)
        return found.cache[site].tokens

    cells = len(
        reader.run("a red cat", record=f"{attention}:k.image", seeds=0, **kw)
        .cache[f"{attention}:k.image"]
        .tensor[0, 0, 0]
    )
    assert tokens(f"{attention}:probs") == (cells + 2, cells + 78)
    with pytest.raises(InvalidInput, match="a word needs text tokens.*are image"):
        tokens(f"{attention}:k.image")


def test_selections_that_do_not_fit_are_errors(reader: Reader) -> None:
    for tokens, text in [
        (24, "token 24 asked for, there are 24 tokens"),
        (torch.ones(25), "tokens is a mask of 25, there are 24 tokens"),
        (torch.ones(6, 4), r"tokens is a mask of \[6, 4\], the grid here is \[4, 6\]"),
    ]:
        with pytest.raises(InvalidInput, match=text):
            run(reader, Steer(SITE, ONES, tokens=tokens))
    for shape in ([7, 11], [1, 77]):
        with pytest.raises(InvalidInput, match=r"a mask of \[.*no grid is known here; .*\[77\]"):
            run(reader, Steer(KEYS, ONES, tokens=torch.ones(shape)))
    with pytest.raises(InvalidInput, match=r"rows at .*: a mask \[1\] is needed, got \[1, 1\]"):
        run(reader, Steer(SITE, ONES, rows=torch.ones(1, 1).bool()))
    with pytest.raises(InvalidInput, match="a Box needs image tokens, the 77 tokens here are text"):
        run(reader, Steer(KEYS, ONES, tokens=Box(0, 0, 0.5, 0.5)))
    with pytest.raises(InvalidInput, match="0 <= left < right <= 1"):
        Box(0.5, 0, 0.5, 1)
    with pytest.raises(InvalidInput, match="rows at .*: 1 asked for, there are 1"):
        run(reader, Steer(SITE, ONES, rows=1))


def test_a_step_window_outside_the_schedule_is_refused_before_the_first_step(
    reader: Reader,
) -> None:
    calls: list[int] = []
    handle = reader.subject.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(
            NeverFired, match=r"steps=slice\(10, 20.*can never fire: this run has steps 0 .. 3"
        ):
            run(reader, Steer(SITE, ONES, steps=slice(10, 20)))
        with pytest.raises(NeverFired, match="can never fire.*sigma"):
            run(reader, Steer(SITE, ONES, sigmas=(1e5, 1e6)))
    finally:
        handle.remove()
    # the site is inside the middle block: nothing of it was computed
    assert len(calls) == 0


def test_steps_that_do_not_exist_are_noted(reader: Reader) -> None:
    report = run(reader, Steer(SITE, ONES, steps=[1, 9])).firing
    assert "steps 9 do not exist: the run had 4" in report.warnings[0]


def test_a_branch_that_the_pipeline_lacks_names_those_it_has(reader: Reader) -> None:
    with pytest.raises(
        UnknownName, match="unknown branch 'conditional'; nearest: cond.*had uncond, cond"
    ):
        run(reader, Steer(SITE, ONES, branch="conditional"))
    with pytest.raises(UnknownName, match="unknown branch 'uncond'.*this run had cond"):
        run(reader, Steer(SITE, ONES, branch="uncond"), guidance_scale=1.0)


def test_time_is_not_guessed_outside_the_loop(reader: Reader) -> None:
    site = "text_encoder.encoder.layers.0"
    with pytest.raises(ClockUnknown, match="a step window was asked for.*text_encoder runs before"):
        run(reader, Steer(site, torch.ones(16), steps=0))
    with pytest.raises(ClockUnknown, match="vae.* has no branch"):
        run(reader, Ablate("vae.decoder.conv_in", branch="cond"), output_type="np")


def test_text_encoders_are_edited_by_branch(reader: Reader) -> None:
    site = "text_encoder.encoder.layers.1"
    plain = run(reader, (), record=site).cache[site]
    result = run(reader, Steer(site, torch.ones(16), branch="uncond"), record=site)
    after = result.cache[site]
    assert torch.equal(after.select(branch="cond").tensor, plain.select(branch="cond").tensor)
    change = after.select(branch="uncond").tensor - plain.select(branch="uncond").tensor
    torch.testing.assert_close(change, torch.ones_like(change), rtol=0, atol=1e-5)
    assert dict(result.firing[0].branches) == {"uncond": 1}


@pytest.mark.parametrize("name", ["context_embedder", f"{FLUX}.ff_context", f"{FLUX}.attn:k.text"])
def test_text_of_the_length_of_the_image_is_text(flux: Reader, name: str) -> None:
    site = f"transformer.{name}"
    assert same_length(flux, site).hw is None
    assert same_length(flux, site, tokens="red").tokens == (1,)
    with pytest.raises(InvalidInput, match="a Box needs image tokens, the 24 tokens here are text"):
        same_length(flux, site, tokens=Box(0, 0, 0.5, 0.5))


@pytest.mark.parametrize("name", ["x_embedder", f"{FLUX}.ff", f"{FLUX}.attn.to_k"])
def test_an_image_of_the_length_of_the_text_is_image(flux: Reader, name: str) -> None:
    site = f"transformer.{name}"
    assert same_length(flux, site).hw == (4, 6)
    with pytest.raises(InvalidInput, match="a word needs text.*the 24 tokens here are image"):
        same_length(flux, site, tokens="red")


def test_tokens_that_may_be_either_are_unknown(flux: Reader) -> None:
    """A block gives the two streams, and its name does not say which comes first."""
    assert same_length(flux, f"transformer.{FLUX}").hw is None
    with pytest.raises(InvalidInput, match="a word needs.*the 24 tokens here are unknown"):
        same_length(flux, f"transformer.{FLUX}", tokens="red")
    with pytest.raises(InvalidInput, match="a Box needs.*the 24 tokens here are unknown"):
        same_length(flux, f"transformer.{FLUX}", tokens=Box(0, 0, 0.5, 0.5))


def test_keys_are_text_where_the_attention_reads_the_text(reader: Reader) -> None:
    block = SITE.removesuffix(".attn2")
    text = [f"{block}.attn2:k", f"{block}.attn2:v", f"{block}.attn2.to_k"]
    image = [block, SITE, f"{SITE}:heads", f"{block}.attn1:k", f"{block}.ff"]
    states = torch.zeros(1, 24, reader.subject.unet.config.cross_attention_dim)
    kw = {"prompt_embeds": states, "negative_prompt_embeds": states, "output_type": "latent"}
    with reader.recording([*text, *image]) as found:
        reader.subject(**kw, **tiny.arguments("sd", 1))
    assert {site: found[site].hw for site in text} == dict.fromkeys(text)
    assert {site: found[site].hw for site in image} == dict.fromkeys(image, (4, 6))
