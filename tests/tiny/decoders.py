"""Every language model class of the installed transformers, shrunk by its usual field names.

A class that the rule of `SIZES` builds needs no line here; the others have one in `FIELDS`. Models
are built from their configuration alone, with seeded weights, and read token ids below `WORDS`.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from .weights import settle

WORDS = 48
LAYERS = 2

# what the usual fields of a configuration become; a field that a class does not have is left out
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim"), 32),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "dim_ff", "d_inner"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "n_inner"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "d_kv", "dim_head", "kv_channels", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    "sliding_window": 4,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "expert_capacity"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("index_n_heads", "index_topk"), 2),
    "index_head_dim": 8,
    **dict.fromkeys(("o_groups", "o_lora_rank"), 2),
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "tie_word_embeddings": False,
}

# kinds of layers, where a model has several
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
RECURRENT = {"layer_types": ["linear_attention", "full_attention"]}
BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": WORDS,
    "pad_token_id": 0,
}
GEMMA = {**BERT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}

# what a class needs beside the rule
FIELDS: dict[str, dict[str, Any]] = {
    "BailingHybridForCausalLM": RECURRENT,
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "BloomForCausalLM": {"hidden_size": 32},
    "Cohere2ForCausalLM": WINDOWED,
    "CohereCompassForCausalLM": {
        **WINDOWED,
        "rope_parameters": dict.fromkeys(
            WINDOWED["layer_types"],
            {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        ),
    },
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "Dots1ForCausalLM": {"n_shared_experts": 1, **WINDOWED},
    "EncoderDecoderModel": {
        "encoder": {"model_type": "bert", **BERT},
        "decoder": {"model_type": "bert", **BERT, "is_decoder": True, "add_cross_attention": True},
    },
    "Exaone4ForCausalLM": WINDOWED,
    "FSMTForConditionalGeneration": {"src_vocab_size": WORDS, "tgt_vocab_size": WORDS},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "Gemma3ForCausalLM": WINDOWED,
    "Gemma3nForCausalLM": {
        **WINDOWED,
        "vocab_size_per_layer_input": WORDS,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
    },
    "Gemma4ForCausalLM": {
        **WINDOWED,
        "vocab_size_per_layer_input": WORDS,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    },
    "Gemma4UnifiedForCausalLM": {**WINDOWED, "global_head_dim": 8},
    "GraniteMoeHybridForCausalLM": RECURRENT,
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearForCausalLM": RECURRENT,
    "LEDForConditionalGeneration": {"attention_window": 4},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Lfm3ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "OlmoHybridForCausalLM": RECURRENT,
    "Qwen3NextForCausalLM": RECURRENT,
    "Qwen3_5ForCausalLM": RECURRENT,
    "Qwen3_5MoeForCausalLM": RECURRENT,
    "Qwen4ExpForCausalLM": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "ReformerModelWithLMHead": {
        "attn_layers": ["local", "local"],
        "attention_head_size": 8,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "feed_forward_size": 64,
    },
    "RoCBertForCausalLM": {
        "shape_vocab_size": WORDS,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": WORDS,
        "pronunciation_embed_dim": 8,
    },
    "T5GemmaForConditionalGeneration": {"encoder": GEMMA, "decoder": GEMMA},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": {"layers_block_type": ["linear_attention", "hybrid"]},
    "Zamba2ForCausalLM": {"layers_block_type": ["linear_attention", "hybrid"]},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "xLSTMForCausalLM": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0},
}

# further configurations of a class that has several layouts
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "FalconForCausalLM, two kv heads": (
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "FalconForCausalLM, ALiBi": ("FalconForCausalLM", {"alibi": True, "multi_query": False}),
    "GPTBigCodeForCausalLM, multi-head": ("GPTBigCodeForCausalLM", {"multi_query": False}),
    "GPTNeoXForCausalLM, sequential": (
        "GPTNeoXForCausalLM",
        {"use_parallel_residual": False, "rotary_pct": 0.5},
    ),
    "OPTForCausalLM, projected": ("OPTForCausalLM", {"word_embed_proj_dim": 16}),
    "PhiForCausalLM, normed": ("PhiForCausalLM", {"qk_layernorm": True}),
}

# classes that read the whole text again for every token that they write
UNCACHED = ("OpenAIGPTLMHeadModel",)
# classes that put tokens of their own beside those of the prompt while they write
OWN_TOKENS = ("CpmAntForCausalLM", "XLMWithLMHeadModel", "XLNetLMHeadModel")

# why a class is not here
LEFT_OUT: dict[str, str] = {
    "BltForCausalLM": "reads bytes in patches of their entropy, beside a second model",
    **dict.fromkeys(
        ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"),
        "drafts for another model, whose keys and values it reads",
    ),
    **dict.fromkeys(
        ("MusicgenForCausalLM", "MusicgenMelodyForCausalLM"),
        "reads codes of sound, several in the place of one token",
    ),
    **dict.fromkeys(
        (
            "AudioFlamingo3ForConditionalGeneration",
            "FuyuForCausalLM",
            "Gemma3ForConditionalGeneration",
            "Gemma3nForConditionalGeneration",
            "Gemma4ForConditionalGeneration",
            "Gemma4UnifiedForConditionalGeneration",
            "GitForCausalLM",
            "GlmAsrForConditionalGeneration",
            "GotOcr2ForConditionalGeneration",
            "GraniteSpeechForConditionalGeneration",
            "GraniteSpeechPlusForConditionalGeneration",
            "MossTranscribeDiarizeForConditionalGeneration",
            "MusicFlamingoForConditionalGeneration",
            "Nemotron3_5TranscribeForConditionalGeneration",
            "Phi4MultimodalForCausalLM",
            "Qwen2AudioForConditionalGeneration",
            "Qwen3ASRForConditionalGeneration",
            "T5Gemma2ForConditionalGeneration",
            "VibeVoiceAsrForConditionalGeneration",
            "VoxtralForConditionalGeneration",
            "VoxtralRealtimeForConditionalGeneration",
        ),
        "has a tower for pictures or sound, and a language model of a class with a line of its own",
    ),
}


@cache
def classes() -> Mapping[str, str]:
    """Name of every class -> `causal` or `seq2seq`."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, str] = {}
    for kind, names in (
        ("causal", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("seq2seq", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ):
        found |= {name: kind for name in names.values() if name not in found}
    return found


def names() -> list[str]:
    """Every class and variant that `build` knows."""
    return [each for each in classes() if each not in LEFT_OUT] + list(VARIANTS)


def kind(name: str) -> str:
    """`causal` or `seq2seq`, of a class or variant."""
    return classes()[VARIANTS.get(name, (name,))[0]]


def config(name: str) -> Any:
    """The small configuration of a class or variant."""
    import transformers

    stem, fields = VARIANTS.get(name, (name, {}))
    config_class = getattr(transformers, stem).config_class
    known = {each.name for each in dataclasses.fields(config_class)}
    small = {field: value for field, value in SIZES.items() if field in known}
    if "kv_lora_rank" in known:
        small["num_key_value_heads"] = 4  # latent attention: keys and values of every head
    if classes()[stem] == "causal":
        small |= {"is_decoder": True} if "is_decoder" in known else {}
    else:
        small["decoder_start_token_id"] = 2
    return config_class(**{**small, **FIELDS.get(stem, {}), **fields})


def build(name: str) -> Any:
    """A new model of a class or variant; its weights depend only on `name`."""
    import transformers

    model_class = getattr(transformers, VARIANTS.get(name, (name,))[0])
    torch.manual_seed(0)
    model = settle(model_class(config(name)), name)
    for path, weight in model.named_parameters():
        if weight.ndim == 3 and "expert" in path:  # one matrix for each expert, no kernel
            weight.data *= weight.shape[1] ** 0.5
    model.generation_config.eos_token_id = None  # writes as many tokens as it is asked for
    model.generation_config.num_beams = 1
    model.generation_config.use_cache = True
    return model


def tokenizer() -> Any:
    """One token for each word: `w5` is token 5. Tokens 0 to 2 are padding, start and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    words = [*specials, *(f"w{number}" for number in range(len(specials), WORDS))]
    numbers = {word: number for number, word in enumerate(words)}
    found = Tokenizer(models.WordLevel(numbers, unk_token="<s>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=found,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )
