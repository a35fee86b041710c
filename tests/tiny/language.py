"""Tiny language models, one per decoder family, with a tokenizer of the family's class."""

from typing import Any

from . import text
from .weights import settle

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED: dict[str, Any] = {**SIZE, "num_key_value_heads": 2, "head_dim": 8}


def _specials(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def gpt2() -> tuple[Any, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = text.byte_tokenizer()
    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=128, **_specials(tokenizer))
    return settle(GPT2LMHeadModel(config), "gpt2"), tokenizer


def gpt_neox() -> tuple[Any, Any]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer = text.byte_tokenizer()
    config = GPTNeoXConfig(**SIZE, **_specials(tokenizer))
    return settle(GPTNeoXForCausalLM(config), "gpt-neox"), tokenizer


def llama() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = text.byte_tokenizer()
    return settle(
        LlamaForCausalLM(LlamaConfig(**GROUPED, **_specials(tokenizer))), "llama"
    ), tokenizer


def qwen2() -> tuple[Any, Any]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = text.qwen_tokenizer()
    tokenizer.padding_side = "left"
    config = Qwen2Config(**SIZE, num_key_value_heads=2, **_specials(tokenizer))
    return settle(Qwen2ForCausalLM(config), "qwen2"), tokenizer


def qwen3() -> tuple[Any, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = text.qwen_tokenizer()
    tokenizer.padding_side = "left"
    return settle(
        Qwen3ForCausalLM(Qwen3Config(**GROUPED, **_specials(tokenizer))), "qwen3"
    ), tokenizer


def gemma2() -> tuple[Any, Any]:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = text.gemma_tokenizer()
    config = Gemma2Config(
        **GROUPED, **_specials(tokenizer), query_pre_attn_scalar=8, sliding_window=16
    )
    return settle(Gemma2ForCausalLM(config), "gemma2"), tokenizer


def gemma3() -> tuple[Any, Any]:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = text.gemma_tokenizer()
    config = Gemma3TextConfig(
        **GROUPED,
        **_specials(tokenizer),
        query_pre_attn_scalar=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return settle(Gemma3ForCausalLM(config), "gemma3"), tokenizer
