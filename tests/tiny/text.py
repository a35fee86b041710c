"""Tokenizers and text encoders of the tiny pipelines, built offline from a short word list.

Every tokenizer is of the class that the pipeline asks for. Frequent words are one token, other
words fall apart into letters, so a test can have both words of one token and words of several.
"""

from typing import Any

from .weights import settle

WORDS = (
    "a an and the of on in at by with to is two small large red green blue yellow black white "
    "cat dog bird circle square triangle star house tree photo painting picture frame "
    "background top bottom left right color shape size texture quantity text spatial "
    "relationships objects image detailing Describe system user assistant You are designed "
    "generate superior images degree alignment based textual prompts or Prompt Start "
).split()
BARE = (
    "Describe",
    "system",
    "user",
    "assistant",
    "You",
    "a",
    "A",
    "The",
)  # also at the start of a line
MARK = "\u2581"  # sentencepiece's sign for a space


def _byte_letters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _byte_pairs(
    alphabet: list[str], words: list[str], specials: list[str], suffix: str = ""
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in which a word grows from its first letter, one per merge."""
    vocab = {piece: index for index, piece in enumerate(specials)}
    for letter in alphabet + [letter + suffix for letter in alphabet]:
        vocab.setdefault(letter, len(vocab))
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        letters = [*word[:-1], word[-1] + suffix]
        piece = letters[0]
        for letter in letters[1:]:
            merges.setdefault((piece, letter))
            piece += letter
            vocab.setdefault(piece, len(vocab))
    return vocab, list(merges)


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    words = [word.lower() for word in WORDS if len(word) > 1]
    vocab, merges = _byte_pairs(
        _byte_letters(), words, ["<|startoftext|>", "<|endoftext|>"], suffix="</w>"
    )
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def t5_tokenizer() -> Any:
    """The class of T5, UMT5 and PixArt: a unigram model."""
    from transformers import T5Tokenizer

    letters = sorted({chr(code) for code in range(33, 127)})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (MARK, -2.0)]
    pieces += [(MARK + word, -3.0) for word in WORDS]
    pieces += [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _spaced(space: str) -> list[str]:
    return [space + word for word in WORDS] + list(BARE)


def qwen_tokenizer() -> Any:
    """Counts the template of QwenImage as the real one does: 34 tokens before the prompt."""
    from transformers import Qwen2Tokenizer

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab, merges = _byte_pairs(_byte_letters(), _spaced("\u0120"), specials)
    return Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=specials[1:])


def gemma_tokenizer() -> Any:
    from transformers import GemmaTokenizer

    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    specials += [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [MARK, *(chr(code) for code in range(33, 127))]
    vocab, merges = _byte_pairs(letters, _spaced(MARK), specials)
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def byte_tokenizer(prefixed: bool = False) -> Any:
    """A plain fast tokenizer over bytes, as GPT-2, GPT-NeoX and Llama checkpoints carry one.

    `prefixed`: starts every text with the first special token, as that of GLM does, so no text is
        empty.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab, merges = _byte_pairs(_byte_letters(), _spaced("\u0120"), ["<|endoftext|>", "<|pad|>"])
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if prefixed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|pad|>",
        padding_side="left",
        model_max_length=512,
    )


def clip_encoder(tokenizer: Any, name: str, width: int = 16, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return settle((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), name)


def t5_encoder(tokenizer: Any, name: str, width: int = 32, multilingual: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config_class, model = (
        (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    )
    config = config_class(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        feed_forward_proj="gated-gelu",
    )
    return settle(model(config), name)


def gemma_encoder(tokenizer: Any, name: str, width: int = 32) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=32,
        max_position_embeddings=512,
    )
    return settle(Gemma2Model(config), name)


def glm_encoder(tokenizer: Any, name: str, width: int = 32) -> Any:
    from transformers import GlmConfig, GlmModel

    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=512,
    )
    return settle(GlmModel(config), name)


def qwen_vl_encoder(tokenizer: Any, name: str, width: int = 32) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 10000.0,
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
        },
    )
    return settle(Qwen2_5_VLForConditionalGeneration(config), name)


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word.lower() for word in WORDS)]
    words += [*letters, *("##" + letter for letter in letters)]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return BertTokenizer(vocab=vocab, model_max_length=77)


def bert_encoder(tokenizer: Any, name: str, width: int = 16) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=80,
    )
    return settle(BertModel(config), name)


def chat_tokenizer() -> Any:
    """With a chat template, as Qwen3 has one."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def qwen3_encoder(
    tokenizer: Any, name: str, width: int = 32, layers: int = 2, causal: bool = False
) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
    )
    return settle((Qwen3ForCausalLM if causal else Qwen3Model)(config), name)


def llama_encoder(tokenizer: Any, name: str, width: int = 32) -> Any:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
    )
    return settle(LlamaModel(config), name)
