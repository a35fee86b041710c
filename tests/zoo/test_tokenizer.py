"""The caption tokenizer: one token a word, and no caption is cut."""

import random

from dreamreader.zoo import models, scenes


def test_every_caption_word_is_one_token():
    tokenizer = models.build_tokenizer()
    assert {
        word: len(tokenizer(word).input_ids) - 2 for word in models.vocabulary()
    } == dict.fromkeys(models.vocabulary(), 1)


def test_other_words_fall_apart_and_come_back():
    tokenizer = models.build_tokenizer()
    ids = tokenizer("a hexagon").input_ids
    assert len(ids) > 4
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a hexagon"


def test_no_caption_is_cut():
    tokenizer = models.build_tokenizer()
    rng = random.Random(0)
    captions = [scenes.sample_scene(rng).caption() for _ in range(5000)]
    longest = max(len(ids) for ids in tokenizer(captions).input_ids)
    assert longest <= models.CAPTION_TOKENS == tokenizer.model_max_length
