"""Small tokenizers of every kind, trained on a few sentences of several scripts."""

from collections.abc import Callable
from typing import Any

SENTENCES = [
    "a crème on the mat, a cat.",
    "Кот сидел на стуле и ел",
    "猫が好きです。私は猫を見た",
    "كِتَاب جديد على الطاولة",
    "I 👍🏽 love 🐈 and 👨‍👩‍👧 ok",
    "การเดินทางของแมวดำ",
    "हिन्दी में बिल्ली है",
    "고양이 한 마리 있다",
    "a cre\u0300me here",
    "don't well-known C++ red dog",
]


def byte_level() -> Any:
    """As GPT-2, Llama 3 and Qwen have it: letters beyond ASCII fall apart into bytes."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    marks = {"bos_token": "<s>", "pad_token": "<pad>"}
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[*marks.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = {
        "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "decoder": decoders.ByteLevel(),
    }
    return _trained(models.BPE(), trainer, "<s> $A", marks, **parts)


def byte_fallback() -> Any:
    """As sentencepiece's BPE of Llama 2 and Gemma: what has no piece becomes bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<pad>", "<s>", "<unk>", *(f"<0x{each:02X}>" for each in range(256))]
    pieces += "\u2581abcdefghijklmnopqrstuvwxyz"
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(space)
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    return _fast(tokenizer, {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"})


def unigram() -> Any:
    """As sentencepiece's of T5, XLM-R and ALBERT."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    trainer = trainers.UnigramTrainer(
        vocab_size=170,
        special_tokens=[*marks.values()],
        unk_token="<unk>",
        show_progress=False,
    )
    parts = {
        "pre_tokenizer": pre_tokenizers.Metaspace(),
        "decoder": decoders.Metaspace(),
        "normalizer": normalizers.NFKC(),
    }
    return _trained(models.Unigram(), trainer, "$A </s>", marks, **parts)


def word_pieces() -> Any:
    """As BERT's, without upper case and accents."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    trainer = trainers.WordPieceTrainer(
        vocab_size=220, special_tokens=[*marks.values()], show_progress=False
    )
    parts = {
        "pre_tokenizer": pre_tokenizers.BertPreTokenizer(),
        "decoder": decoders.WordPiece(),
        "normalizer": normalizers.BertNormalizer(lowercase=True),
    }
    return _trained(models.WordPiece(unk_token="[UNK]"), trainer, "[CLS] $A [SEP]", marks, **parts)


def slow_bytes() -> Any:
    """A tokenizer in Python alone, which gives no offsets."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def _trained(model: Any, trainer: Any, form: str, marks: dict[str, str], **parts: Any) -> Any:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    special = [each for each in form.split() if each != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[(each, tokenizer.token_to_id(each)) for each in special]
    )
    return _fast(tokenizer, marks)


def _fast(tokenizer: Any, marks: dict[str, str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **marks)


KINDS: list[Callable[[], Any]] = [byte_level, byte_fallback, unigram, word_pieces, slow_bytes]
