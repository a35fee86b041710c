"""Decoding by hand: which call goes on with which, and what must be refused where that is open."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny import decoders
from torch import Tensor, nn

import dreamreader as dr
from dreamreader.engine import Stream
from dreamreader.engine._lm_tracker import LanguageTracker
from dreamreader.errors import ClockUnknown

from .test_language_calls import marks

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
BLOCK = "model.layers.0"
SETTINGS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
Call = Callable[[], Any]


@pytest.fixture(scope="module")
def llama() -> dr.Reader:
    return dr.Reader(decoders.build("LlamaForCausalLM"), decoders.tokenizer())


def empty(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


def written(reader: dr.Reader, call: Call, site: str = BLOCK, **selection: Any) -> list[int]:
    """How many entries an edit changes in each call of the site."""
    return [int(torch.tensor(each).sum()) for each in marks(reader, site, call, **selection)]


def refused(reader: dr.Reader, call: Call, why: str, site: str = BLOCK, rest: bool = True) -> None:
    """Steps, the prompt's end and words are refused; what needs none of them runs."""
    for selection in ({"steps": [0]}, {"tokens": -1}, {"tokens": "w3"}):
        with pytest.raises(ClockUnknown, match=why):
            marks(reader, site, call, **selection)
    assert all(bool(torch.tensor(each).all()) for each in marks(reader, site, call))
    if rest:  # places in the row are known
        assert sum(written(reader, call, site, tokens=[0])) > 0


# calls without a cache


def test_one_token_more_without_a_cache_may_be_either(llama: dr.Reader) -> None:
    model = llama.subject

    def grown() -> None:
        for count in (3, 4):
            model(IDS[:, :count])

    refused(llama, grown, "repeats an earlier one with one more token and no cache")
    assert written(llama, grown, tokens=[3]) == [0, 1]
    with pytest.raises(ClockUnknown, match="ran more than once, and which step each call is of"):
        with torch.no_grad(), llama.recording(dr.Record(BLOCK, tokens=[0])):
            grown()


@pytest.mark.parametrize("how", ["embeddings", "padding", "a prompt between", "one row of two"])
def test_one_token_more_is_seen_in_every_form(llama: dr.Reader, how: str) -> None:
    model = llama.subject
    embed = model.get_input_embeddings()

    def grown() -> None:
        if how == "embeddings":
            model(inputs_embeds=embed(IDS[:, :3]))
            model(inputs_embeds=embed(IDS[:, :4]))
        elif how == "padding":
            model(IDS[:, :3])
            ids = torch.cat([torch.zeros_like(IDS[:, :2]), IDS[:, :4]], 1)
            model(ids, attention_mask=(ids > 0).long())
        elif how == "a prompt between":
            model(IDS[:, :3])
            model(IDS[:, 2:])
            model(IDS[:, :4])
        else:  # the other has ended
            both = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 0]])
            model(both, attention_mask=(both > 0).long())
            both = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])
            model(both, attention_mask=(both > 0).long())

    with pytest.raises(ClockUnknown, match="one more token and no cache"):
        marks(llama, BLOCK, grown, tokens=-1)


def test_prompts_that_do_not_grow_by_one_are_prompts(llama: dr.Reader) -> None:
    model = llama.subject

    def prompts() -> None:
        for ids in (IDS[:, :3], IDS[:, :3], IDS[:, :5], IDS[:, 1:3]):
            model(ids)

    found = marks(llama, BLOCK, prompts, tokens=-1)
    assert found == [[[0, 0, 1]], [[0, 0, 1]], [[0, 0, 0, 0, 1]], [[0, 1]]]
    assert written(llama, prompts, steps=[0]) == [3, 3, 5, 2]


def test_a_decoder_that_attends_to_another_text_begins_anew() -> None:
    model = decoders.build("T5ForConditionalGeneration")
    reader, site = dr.Reader(model), "decoder.block.0"
    start = torch.tensor([[2, 9]])

    def calls(source: Tensor) -> Call:
        def both() -> None:
            model(IDS, decoder_input_ids=start[:, :1])
            model(source, decoder_input_ids=start)

        return both

    assert written(reader, calls(IDS + 1), site, steps=[0]) == [1, 2]
    with pytest.raises(ClockUnknown, match="one more token and no cache"):
        marks(reader, site, calls(IDS), steps=[0])


# calls with a cache


def test_calls_follow_the_cache_that_they_are_given(llama: dr.Reader) -> None:
    model = llama.subject

    def interleaved() -> None:
        one, two = model(IDS), model(IDS[:, :2])  # caches that the model makes itself
        model(IDS[:, :1], past_key_values=one.past_key_values)
        model(IDS[:, :1], past_key_values=two.past_key_values)
        three = model(IDS, return_dict=False)
        model(IDS[:, :1], past_key_values=three[1])

    assert written(llama, interleaved, steps=[1]) == [0, 0, 1, 1, 0, 1]
    assert written(llama, interleaved, tokens=[6]) == [0, 0, 1, 0, 0, 1]
    assert written(llama, interleaved, tokens="w4") == [1, 1, 0, 0, 1, 0]
    with torch.no_grad(), llama.recording(BLOCK, steps=[1]) as cache:
        interleaved()
    assert cache[BLOCK].shape[:2] == (3, 1)  # three texts of one step, none of two


def test_a_cache_of_the_same_length_is_not_the_same(llama: dr.Reader) -> None:
    model = llama.subject
    with torch.no_grad():
        held = model(IDS).past_key_values

    def call() -> None:
        model(IDS + 1)
        model(IDS[:, :1], past_key_values=held)
        held.crop(-1)

    with pytest.raises(ClockUnknown, match="the cache was filled before"):
        marks(llama, BLOCK, call, steps=[1])


@pytest.mark.parametrize("lengths", [(3, 3), (3, 1, 2), (2, 2, 1)])
def test_several_tokens_behind_a_cache_leave_the_prompt_open(
    llama: dr.Reader, lengths: tuple[int, ...]
) -> None:
    """A prompt in chunks, a second turn, a draft: nothing tells which."""
    model = llama.subject

    def chunks() -> None:
        cache, begin = empty(model), 0
        for length in lengths:
            model(IDS[:, begin : begin + length], past_key_values=cache)
            begin += length

    refused(llama, chunks, "several tokens came in behind those in the cache")
    last = sum(lengths) - 1
    assert written(llama, chunks, tokens=[last]) == [0] * (len(lengths) - 1) + [1]


def test_a_mask_that_contradicts_the_earlier_calls_is_refused(llama: dr.Reader) -> None:
    model = llama.subject
    mask = torch.tensor([[0, 0, 1, 1, 1]])

    def call() -> None:
        cache = empty(model)
        model(IDS[:, :4], past_key_values=cache)
        model(IDS[:, 4:5], past_key_values=cache, attention_mask=mask)

    with pytest.raises(ClockUnknown, match="marks other tokens of the cache as padding"):
        marks(llama, BLOCK, call, tokens=[2])


def test_a_padded_cache_that_was_changed_is_refused(llama: dr.Reader) -> None:
    model = llama.subject

    def call() -> None:
        cache = empty(model)
        model(IDS[:, :4], past_key_values=cache, attention_mask=torch.tensor([[0, 1, 1, 1]]))
        cache.crop(-1)
        model(IDS[:, :1], past_key_values=cache)

    with pytest.raises(ClockUnknown, match="which of its tokens are padding is unknown"):
        marks(llama, BLOCK, call, tokens=[2])


def test_a_decoders_own_cache_does_not_count_the_encoders_tokens() -> None:
    model = decoders.build("T5ForConditionalGeneration")
    reader, site = dr.Reader(model), "decoder.block.0"
    ids = torch.tensor([[2, 9, 10]])

    def loop(cache: Any) -> Call:
        def call() -> None:
            out = model(IDS, decoder_input_ids=ids[:, :2], past_key_values=cache())
            model(IDS, decoder_input_ids=ids[:, 2:], past_key_values=out.past_key_values)

        return call

    assert marks(reader, site, loop(lambda: None), tokens=[2]) == [[[0, 0]], [[1]]]
    assert written(reader, loop(lambda: None), site, steps=[1]) == [0, 1]
    with pytest.raises(ClockUnknown, match="does not say how many tokens it has read"):
        marks(reader, site, loop(lambda: empty(model)), tokens=[2])


# a cache that is kept between calls of generate


@pytest.mark.parametrize(
    ("turn", "expected"),
    [("whole", [0, 0, 0, 1, 0, 0]), ("new with mask", [0, 0, 0, 1, 0, 0]), ("new", None)],
)
def test_a_second_turn_has_the_places_of_the_whole_text(
    llama: dr.Reader, turn: str, expected: list[int] | None
) -> None:
    model, new = llama.subject, torch.tensor([[20, 21, 22, 23, 24]])

    def turns() -> None:
        cache = empty(model)
        first = model.generate(IDS, past_key_values=cache, **SETTINGS)  # the last is not yet read
        ids = torch.cat([first, new], 1) if turn == "whole" else torch.cat([first[:, -1:], new], 1)
        more = {}
        if turn == "new with mask":
            more = {"attention_mask": torch.ones(1, first.shape[1] + 5, dtype=torch.long)}
        model.generate(ids, past_key_values=cache, **more, **SETTINGS)

    if expected is None:
        for selection in ({"steps": [3]}, {"tokens": [11]}, {"tokens": -1}):
            with pytest.raises(ClockUnknown, match="was given 6 tokens and a cache that holds 8"):
                marks(llama, BLOCK, turns, **selection)
        return
    last = marks(llama, BLOCK, turns, tokens=-1)
    assert last[0] == [[0, 0, 0, 0, 0, 1]] and last[3] == [[0, 0, 0, 0, 0, 1]]
    assert written(llama, turns, tokens=[11]) == expected
    assert written(llama, turns, steps=[0]) == [6, 0, 0, 6, 0, 0]


def test_words_of_a_second_turn_are_found_in_its_text(llama: dr.Reader) -> None:
    model = llama.subject
    cache = empty(model)
    with torch.no_grad():
        first = model.generate(IDS, past_key_values=cache, **SETTINGS)
    text = torch.cat([first, torch.tensor([[20, 21]])], 1)
    found = marks(
        llama, BLOCK, lambda: model.generate(text, past_key_values=cache, **SETTINGS), tokens="w20"
    )
    assert found == [[[0, 1, 0]], [[0]], [[0]]]


def test_embeddings_of_a_second_turn_alone_are_refused(llama: dr.Reader) -> None:
    model = llama.subject
    embed = model.get_input_embeddings()

    def turns() -> None:
        cache = empty(model)
        model.generate(IDS, past_key_values=cache, **SETTINGS)
        mask = torch.ones(1, 13, dtype=torch.long)
        model.generate(
            inputs_embeds=embed(IDS[:, :5]), past_key_values=cache, attention_mask=mask, **SETTINGS
        )

    with pytest.raises(ClockUnknown, match="which of them are new is unknown"):
        marks(llama, BLOCK, turns, tokens=-1)


def test_a_state_that_generate_is_given_does_not_say_what_it_read() -> None:
    model = decoders.build("MambaForCausalLM")
    reader, site = dr.Reader(model), "backbone.layers.0"

    def turns() -> None:
        state = model(IDS, use_cache=True).cache_params
        model.generate(IDS, cache_params=state, **SETTINGS)

    with pytest.raises(ClockUnknown, match="does not say how many tokens it has read"):
        marks(reader, site, turns, tokens=[1])


# states


RECURRENT = {
    "MambaForCausalLM": ("backbone.layers.0", "cache_params"),
    "RwkvForCausalLM": ("rwkv.blocks.0", "state"),
    "xLSTMForCausalLM": ("backbone.blocks.0", "cache_params"),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_state_does_not_say_the_step(name: str) -> None:
    model = decoders.build(name)
    reader, (site, state) = dr.Reader(model), RECURRENT[name]

    def loop() -> None:
        out = model(IDS[:, :4], use_cache=True)
        model(IDS[:, 4:5], use_cache=True, **{state: out[state]})

    why = "does not say how many tokens it has read"
    for selection in ({"steps": [1]}, {"tokens": [4]}):
        with pytest.raises(ClockUnknown, match=why):
            marks(reader, site, loop, **selection)
    assert written(reader, loop, site) == [4, 1]


class Remembering(nn.Module):
    """Adds to each token what it saw last, and keeps it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        if form == "buffer":
            self.register_buffer("seen", torch.zeros(1, 32))

    def forward(self, x: Tensor) -> Tensor:
        last = x[:, -1].detach()
        kept = {"tensor": last, "list": [last], "dict": {"h": (last, last)}, "buffer": last}
        self.seen = kept[self.form]
        return x


@pytest.mark.parametrize("form", ["tensor", "list", "dict", "buffer"])
def test_a_state_within_modules_is_seen(form: str) -> None:
    model = decoders.build("LlamaForCausalLM")
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp, Remembering(form))

    def loop() -> None:
        for ids in IDS.split([4, 1, 1], 1):
            model(ids, use_cache=False)

    reader = dr.Reader(model, decoders.tokenizer())
    refused(reader, loop, "keeps its state in its modules", rest=False)
    assert written(reader, lambda: model(IDS, use_cache=False), steps=[0]) == [6]


def test_recurrent_gemma_by_hand_needs_its_cache() -> None:
    model = decoders.build("RecurrentGemmaForCausalLM")
    reader = dr.Reader(model, decoders.tokenizer())

    def loop(cache: Any) -> Call:
        def call() -> None:
            more = {} if cache is None else {"past_key_values": cache()}
            for ids in IDS.split([4, 1, 1], 1):
                model(ids, use_cache=True, **more)

        return call

    refused(reader, loop(None), "keeps its state in its modules", rest=False)
    kept = loop(lambda held=[]: held[0] if held else held.append(empty(model)) or held[0])
    assert written(reader, kept, steps=[2])[:3] == [0, 0, 1]


# what was refused and can be known


def test_a_model_that_reads_all_again_has_steps() -> None:
    model = decoders.build("OpenAIGPTLMHeadModel")
    reader, site = dr.Reader(model), "transformer.h.0"

    def call() -> None:
        model.generate(IDS, **SETTINGS)

    assert written(reader, call, site, steps=[1]) == [0, 7, 0]
    assert written(reader, call, site, tokens=-1) == [1, 1, 1]
    assert written(reader, call, site, tokens=[7]) == [0, 0, 1]


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_labels_without_loss_are_the_decoders_padding(name: str) -> None:
    model = decoders.build(name)
    reader = dr.Reader(model)
    site = "decoder.block.0" if name.startswith("T5") else "model.decoder.layers.0"
    labels = torch.tensor([[11, 12, 13, 14], [15, 16, -100, -100]])
    source = torch.cat([IDS, IDS + 1])
    given: list[Tensor] = []
    embed = model.get_decoder().get_input_embeddings()
    handle = embed.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    found = marks(reader, site, lambda: model(source, labels=labels))
    handle.remove()
    read = next(each for each in given if each.shape == labels.shape)
    assert found == [(read != model.config.pad_token_id).int().tolist()]
    last = marks(reader, site, lambda: model(source, labels=labels), tokens=-1)
    assert last == [[[0, 0, 0, 1], [0, 0, 1, 0]]]
    with pytest.raises(ClockUnknown, match="labels have -100 before other tokens"):
        marks(reader, site, lambda: model(source, labels=labels.flip(1)), tokens=0)


def test_the_mask_of_given_encoder_states_is_theirs() -> None:
    model = decoders.build("T5ForConditionalGeneration")
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        states = model.get_encoder()(IDS, attention_mask=mask)
    site = "decoder.block.0.layer.1.EncDecAttention.k"
    labels = torch.tensor([[9, 10]])
    found = marks(
        dr.Reader(model),
        site,
        lambda: model(encoder_outputs=states, attention_mask=mask, labels=labels),
    )
    assert found == [[[1, 1, 1, 1, 0, 0]]]


def test_decoder_inputs_that_are_made_of_a_padded_text_are_unknown() -> None:
    model = decoders.build("BartForConditionalGeneration").model
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    reader, site = dr.Reader(model), "decoder.layers.0"
    assert written(reader, lambda: model(IDS), site, tokens=-1) == [1]
    with pytest.raises(ClockUnknown, match="was called without decoder_input_ids"):
        marks(reader, site, lambda: model(IDS, attention_mask=mask), tokens=-1)


def test_an_encoder_streams_as_it_has_no_step() -> None:
    reader = dr.Reader(decoders.build("T5ForConditionalGeneration"), decoders.tokenizer())
    site, found = "encoder.block.0", []
    prompts = ["w5 w6", "w7 w8 w9"]
    reader.run(prompts, record=Stream(site, lambda flowing: found.append(flowing)))
    assert [each.instant for each in found] == [None]
    assert found[0].tokens.tolist() == [0, 1, 0, 1, 2]
    values = reader.run(prompts, record=site).cache[site].tensor
    assert torch.equal(found[0].x, values[:, 0])


class Hidden(transformers.T5ForConditionalGeneration):
    """Hands its arguments on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(*args, **kwargs)


def test_a_subclass_that_hands_arguments_on_is_still_an_encoder_decoder() -> None:
    model = decoders.build("T5ForConditionalGeneration")
    model.__class__ = Hidden
    tracker = LanguageTracker(dr.Reader(model)._subject)
    assert tracker._encoders == {model.get_encoder()}
    ids = torch.tensor([[2, 9, 10]])
    found = marks(
        dr.Reader(model),
        "decoder.block.0",
        lambda: model(input_ids=IDS, decoder_input_ids=ids),
        tokens=-1,
    )
    assert found == [[[0, 0, 1]]]
