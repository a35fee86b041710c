"""Watched attentions against recorded probabilities of the same run."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dreamreader.engine import Attention, Call, Reader, Record, Watch
from dreamreader.engine._probs import FormedAttention, FusedAttention
from dreamreader.errors import ClockUnknown, InvalidInput, NeverFired

PROMPTS = ["a red cat", "a dog on a tree"]
SITE = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2:probs"
SITES = [
    ("sd", SITE),
    ("sd", "unet.mid_block.attentions.0.transformer_blocks.0.attn1:probs"),
    ("sd", "text_encoder.encoder.layers.0.self_attn:probs"),
    ("sdxl", "unet.mid_block.attentions.0.transformer_blocks.1.attn2:probs"),
    ("sd3", "transformer.transformer_blocks.1.attn:probs"),
    ("flux", "transformer.transformer_blocks.0.attn:probs"),
    ("flux", "transformer.single_transformer_blocks.0.attn:probs"),
    ("qwen-image", "transformer.transformer_blocks.0.attn:probs"),
    ("aura-flow", "transformer.single_transformer_blocks.0.attn:probs"),
    ("pixart-sigma", "transformer.transformer_blocks.1.attn2:probs"),
    ("pixart-sigma", "text_encoder.encoder.block.0.layer.0.SelfAttention:probs"),
    ("sana", "transformer.transformer_blocks.0.attn2:probs"),
    ("cogview4", "transformer.transformer_blocks.0.attn1:probs"),
    ("lumina2", "transformer.layers.0.attn:probs"),
]


class Sums:
    """Adds words over all calls, with weights that depend on the number of keys only."""

    def __init__(self, words: int = 3):
        self.words = words
        self.out: Tensor | None = None
        self.kinds: list[type] = []
        self.calls: list[Call] = []

    def weights(self, keys: int) -> Tensor:
        return torch.randn(1, self.words, keys, generator=torch.Generator().manual_seed(1))

    def __call__(self, attention: Attention, call: Call) -> None:
        batch, heads, queries, keys = attention.shape
        if self.out is None:
            self.out = torch.zeros(batch, heads, self.words, queries)
        attention.words_(self.out, self.weights(keys))
        self.kinds.append(type(attention))
        self.calls.append(call)

    def expected(self, probs: Tensor) -> Tensor:
        """From probabilities [rows, steps, queries, heads, keys]."""
        weights = self.weights(probs.shape[-1])[0]
        return torch.einsum("rsqhk,wk->rhwq", probs.float(), weights)


def run(name: str, record: Any, steps: int = 2, **kw: Any) -> Any:
    pipe = kw.pop("pipe", None) or tiny.pipeline(name)
    arguments = tiny.arguments(name, steps) | kw
    return Reader(pipe).run(PROMPTS, record=record, seeds=0, output_type="latent", **arguments)


@pytest.mark.parametrize(("name", "site"), SITES, ids=lambda each: each.replace(".", "-"))
def test_words_are_those_of_the_probabilities(name: str, site: str) -> None:
    alone = Sums()
    run(name, Watch(site, alone, branch="cond"))
    cache = run(name, Record(site, branch="cond")).cache
    assert alone.out is not None
    close(alone.out, alone.expected(cache[site].tensor))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_recording_and_a_watch_share_a_site() -> None:
    sums, seen = Sums(), []

    def saw(attention: Attention, call: Call) -> None:
        sums(attention, call)
        seen.append(attention.probabilities().transpose(1, 2))

    result = run("sd", [Record(SITE, branch="cond"), Watch(SITE, saw, branch="cond")])
    probs = result.cache[SITE].tensor
    assert torch.equal(torch.stack(seen, 1), probs)
    assert sums.out is not None
    close(sums.out, sums.expected(probs))
    assert [each.kind for each in result.firing] == ["record", "record"]
    assert result.firing[1].calls == 2
    assert result.firing[1].rows == {0, 1} and set(result.firing[1].branches) == {"cond"}


def test_a_selection_gives_its_entries_only() -> None:
    sums = Sums()
    watch = Watch(SITE, sums, rows=[1], steps=[1, 2], branch="uncond")
    run("sd", watch, steps=4)
    probs = run("sd", SITE, steps=4).cache[SITE].select(branch="uncond", rows=[1], step=[1, 2])
    assert sums.out is not None and sums.out.shape[0] == 1
    close(sums.out, sums.expected(probs.tensor))
    assert [call.instant.step for call in sums.calls if call.instant] == [1, 2]
    assert [(row.index, row.prompt, row.seed) for row in sums.calls[0].rows] == [(1, PROMPTS[1], 1)]


def test_rows_are_those_of_the_run_in_every_batch() -> None:
    sums = Sums()
    run("sd", Watch(SITE, lambda _, call: sums.calls.append(call)), steps=1, batch_size=1)
    assert [[row.index for row in call.rows] for call in sums.calls] == [[0], [1]]
    assert [call.branches for call in sums.calls] == [("uncond", "cond")] * 2
    assert sums.calls[0].run != sums.calls[1].run


def test_entries_of_both_branches_are_those_of_the_recording() -> None:
    sums = Sums()
    run("sd", Watch(SITE, sums), steps=1)
    probs = run("sd", SITE, steps=1).cache[SITE].tensor  # [rows, branches, steps, ...]
    assert sums.out is not None
    close(sums.out, sums.expected(probs.transpose(0, 1).flatten(0, 1)))


@pytest.mark.parametrize("size", [1, 3, "max"])
def test_sliced_attention_is_seen_share_by_share(size: int | str) -> None:
    sums, parts = Sums(), []

    def saw(attention: Attention, call: Call) -> None:
        sums(attention, call)
        assert isinstance(attention, FormedAttention)
        parts.append(len(attention.part))

    pipe = tiny.pipeline("sd")
    processor = None
    if size == 3:  # a share that ends inside the heads of a row
        from diffusers.models.attention_processor import SlicedAttnProcessor

        pipe.unet.set_attn_processor(SlicedAttnProcessor(3))
        processor = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor
    else:
        pipe.enable_attention_slicing(size)
    result = run("sd", Watch(SITE, saw, branch="cond"), pipe=pipe)
    probs = run("sd", Record(SITE, branch="cond")).cache[SITE].tensor
    assert sums.out is not None
    close(sums.out, sums.expected(probs))
    heads = probs.shape[-2]
    assert max(parts) == (3 if size == 3 else 1) < 4 * heads
    assert sum(parts) == 2 * 4 * heads
    assert result.firing[0].calls == 2
    if processor is not None:
        kept = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor
        assert kept is processor


def test_shares_have_no_whole_to_give() -> None:
    pipe = tiny.pipeline("sd")
    pipe.enable_attention_slicing("max")
    watch = Watch(SITE, lambda attention, call: attention.probabilities())
    with pytest.raises(InvalidInput, match=r"in shares \(attention slicing\).*use words_"):
        run("sd", watch, pipe=pipe)


class Shapes(TorchDispatchMode):
    """Shapes of everything that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, Tensor):
                self.seen.add(tuple(each.shape[-2:]))
        return found


def test_nothing_of_queries_by_keys_is_formed() -> None:
    from dreamreader import ops  # noqa: F401, declares the operators
    from dreamreader._register import active

    if active["attention_words_"]["CPU"].backend != "native":
        pytest.skip("the reference forms the probabilities")
    sums = Sums()
    with Shapes() as shapes:
        run("sd", Watch(SITE, sums))
    queries, keys = 96, 77
    assert sums.out is not None and sums.out.shape[-1] == queries
    assert not {(queries, keys), (keys, queries)} & shapes.seen
    with Shapes() as shapes:
        run("sd", Record(SITE))
    assert (queries, keys) in shapes.seen, "the test does not see what it should"


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_language_models_with_grouped_heads_and_causal_masks(name: str) -> None:
    model, tokenizer = tiny.language_model(name)
    reader = Reader(model, tokenizer)
    layers, attn = ("transformer.h", "attn") if name == "gpt2" else ("model.layers", "self_attn")
    site = f"{layers}.1.{attn}:probs"
    texts = ["a red cat on a tree", "a dog"]
    sums = Sums()
    reader.run(texts, record=Watch(site, sums))
    probs = reader.run(texts, record=site).cache[site].tensor
    assert sums.out is not None
    close(sums.out, sums.expected(probs))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_range_of_queries_of_a_causal_attention(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.rand(2, 1, 7, 7) > 0.3
    mask = mask if dtype == torch.bool else torch.zeros(2, 1, 7, 7).masked_fill(~mask, -2.0)
    attention = FusedAttention((2, 4, 7, 7), q.dtype, q.device, q, k, mask, True, 0.5)
    weights = torch.randn(2, 3, 7)
    whole = torch.zeros(2, 4, 3, 7)
    attention.words_(whole, weights)
    expected = torch.einsum("bhqk,bwk->bhwq", attention.probabilities(), weights)
    close(whole, expected)
    part = torch.zeros(2, 4, 3, 4)
    attention.words_(part, weights, slice(2, 6))
    close(part, expected[..., 2:6])
    one = torch.zeros(1, 4, 3, 7)
    attention.of([1]).words_(one, weights[1:])
    close(one, expected[1:])
    swapped = torch.zeros(2, 4, 3, 7)
    attention.of([1, 0]).words_(swapped, weights.flip(0))
    close(swapped, expected.flip(0))
    assert attention.of([0, 1]).query.data_ptr() == q.data_ptr(), "neighbours are not copied"


def test_image_and_text_are_known() -> None:
    seen: dict[str, Call] = {}

    def saw(attention: Attention, call: Call) -> None:
        seen.setdefault(call.site, call)

    run("lumina2", Watch(["transformer.layers.0.attn:probs"], saw, branch="cond"), steps=1)
    (call,) = seen.values()
    (_, first), (_, second) = call.text
    assert second - first == len("a dog on a tree".split()) - len("a red cat".split())
    assert call.image == ((first, first + 24), (second, second + 24))
    assert call.grid == call.whole_grid == (4, 6)
    seen.clear()
    run("sd", Watch("unet.mid_block.**.attn[12]:probs", saw, branch="cond"), steps=1)
    one, two = seen.values()
    assert two.image == ((0, 24),) * 2 and two.text == ((0, 77),) * 2
    assert (two.grid, two.whole_grid) == ((4, 6), (8, 12))
    assert two.has_words and not one.has_words
    with pytest.raises(InvalidInput, match="attn1:probs: its 24 keys hold no text tokens"):
        _ = one.text
    assert two.positions(["red", "tree"]) == [[2], [5, 6, 7]]
    assert two.positions(["cat", "cat"]) == [[3, 4], []]
    assert two.prompt() == [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]


def test_as_many_text_tokens_as_image_tokens_are_not_taken_for_each_other() -> None:
    seen: dict[str, Call] = {}
    pipe = tiny.pipeline("sd")
    pipe.tokenizer.model_max_length = 24  # as the middle has
    watch = Watch(
        "unet.mid_block.**.attn[12]:probs", lambda _, call: seen.update({call.site: call})
    )
    run("sd", watch, steps=1, pipe=pipe)
    one, two = seen.values()
    assert one.image[0] == two.image[0] == two.text[0] == (0, 24)
    assert two.has_words and not one.has_words


def test_two_text_encoders_behind_each_other() -> None:
    seen: list[Call] = []
    site = "transformer.transformer_blocks.0.attn:probs"
    run("sd3", Watch(site, lambda _, call: seen.append(call), branch="cond"), steps=1)
    call = seen[0]
    assert call.image == ((0, 24),) * 2 and call.text == ((24, 24 + 77 + 16),) * 2
    assert call.positions(["red", "tree"]) == [
        [24 + 2, 24 + 77 + 1],
        [24 + 5, 24 + 6, 24 + 7, 24 + 77 + 4],  # three tokens of CLIP, one of T5
    ]


def test_text_outside_the_denoiser_has_no_image() -> None:
    site = "text_encoder.encoder.layers.0.self_attn:probs"
    with pytest.raises(InvalidInput, match="its queries are text, no image tokens"):
        run("sd", Watch(site, lambda _, call: call.image), steps=1)


def test_what_never_fires_is_an_error() -> None:
    with pytest.raises(NeverFired, match=r"Watch\(.*steps=\[7\]\) can never fire"):
        run("sd", Watch(SITE, Sums(), steps=[7]))
    with pytest.raises(ClockUnknown, match="a step window was asked for"):
        run("sd", Watch("text_encoder.encoder.layers.0.self_attn:probs", Sums(), steps=0))


def test_bad_watches_say_why() -> None:
    with pytest.raises(InvalidInput, match="unet.mid_block is no attention; name its probs"):
        Watch("unet.mid_block", Sums())
    with pytest.raises(InvalidInput, match="tokens has no meaning"):
        Watch(SITE, Sums(), tokens=[1])
    with pytest.raises(InvalidInput, match="callback must be a function, got int"):
        Watch(SITE, 3)  # pyright: ignore[reportArgumentType]


def test_recording_block_takes_watches() -> None:
    pipe = tiny.pipeline("sd")
    sums = Sums()
    with Reader(pipe).recording([SITE, Watch(SITE, sums)]) as cache:
        pipe(PROMPTS[0], output_type="latent", **tiny.arguments("sd", 2))
    probs = cache[SITE].tensor.transpose(0, 1).flatten(0, 1)
    assert sums.out is not None
    close(sums.out, sums.expected(probs))
    assert [row.prompt for row in sums.calls[0].rows] == [PROMPTS[0]]
