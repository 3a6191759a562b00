"""Which values the keys of a config.json may have, so that a wrong one is refused by its name.

A key is checked where it stands; whether it must stand there is for the family's function to say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from pagedserve.errors import StartupError
from pagedserve.models.config_json import shown

SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_embd",
    "n_inner",
    "n_head",
    "n_positions",
    "d_model",
    "ffn_dim",
    "ffn_hidden_size",
    "num_kv_heads",
    "num_heads",
    "n_heads",
    "attention_heads",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "base_seqlen",
    "padded_vocab_size",
    "multi_query_group_num",
    "kv_channels",
    "n_embed",
    "n_head_kv",
    "rotary_dim",
    "window_size",
    "word_embed_proj_dim",
    "intermediate_multiple_size",
    "dim_model_base",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
LARGEST = sys.float_info.max
MAX_LAYERS = 10_000  # a spec lists every layer: a mistyped count must not fill the memory
COUNTS = ("sliding_window", "max_window_layers")  # of layers that may not slide at all
NUMBERS = (
    "rms_norm_eps",
    "layer_norm_epsilon",
    "layer_norm_eps",
    "norm_epsilon",
    "norm_eps",
    "partial_rotary_factor",
    "rope_theta",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "logit_scale",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "routed_scaling_factor",
    "clip_qkv",
    "layernorm_epsilon",
    "rotary_pct",
    "rotary_emb_base",
    "rope_pct",
    "rope_ratio",
    "scale_emb",
    "scale_depth",
    "expansion_ratio",
    "embeddings_scale",
    "mup_embeddings_scale",
    "width_scale",
    "mup_width_scale",
    "mup_output_alpha",
)
FLAGS = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "add_cross_attention",
    "multi_query",
    "use_parallel_residual",
    "new_decoder_architecture",
    "parallel_attn",
    "alibi",
    "bias",
    "qkv_bias",
    "use_qkv_bias",
    "use_bias",
    "no_bias",
    "norm_head",
    "do_layer_norm_before",
    "enable_bias",
    "layer_norm_elementwise_affine",
    "scale_embedding",
    "apply_residual_connection_post_layernorm",
    "add_bias_linear",
    "add_qkv_bias",
    "rmsnorm",
    "post_layer_norm",
    "multi_query_attention",
    "original_rope",
    "use_dynamic_ntk",
    "use_logn_attn",
    "learned_pos_emb",
    "scale_qk_dot_by_d",
    "mup_scale_qk_dot_by_d",
    "norm_topk_prob",
    "qk_layernorm",
    "use_qk_norm",
    "attention_out_bias",
    "use_post_norm",
    "use_bidirectional_attention",
)
# null there is as good as leaving it out, or says that there is none
MAY_BE_NULL = frozenset(
    (
        "num_key_value_heads",
        "num_kv_heads",
        "head_dim",
        "word_embed_proj_dim",
        "n_inner",
        "ffn_hidden_size",
        "q_lora_rank",
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "clip_qkv",
        "partial_rotary_factor",
        "rope_theta",
        "logit_scale",
        *COUNTS,
        *FLAGS,
    )
)
# What each rope type reads; one that is not here is refused by the layer that would compute it.
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}

ROPE_OPTIONS = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "llama_4_scaling_beta",
)


def check_values(
    config: Mapping[str, Any], where: str, may_be_null: frozenset[str] = frozenset()
) -> None:
    """Raise StartupError, beginning with `where`, for the first value of the wrong type.

    `may_be_null`: keys that this family may give as null, besides those that any may.
    """
    for keys, is_right, words in (
        (SIZES, is_size, "a positive integer"),
        (DEPTHS, is_depth, f"a positive integer up to {MAX_LAYERS}"),
        (COUNTS, is_integer, "an integer"),
        (NUMBERS, is_number, "a number"),
        (FLAGS, is_flag, "true or false"),
    ):
        for key in keys:
            if key in config and not (config[key] is None and key in MAY_BE_NULL | may_be_null):
                check(key, config[key], where, is_right, words)
    rope = config.get("rope_parameters") or {}
    for one in [rope] if "rope_type" in rope else rope.values():
        check_rope(one, where)


def check_rope(rope: Mapping[str, Any], where: str) -> None:
    """The same for `rope_parameters`, of which its type says what must be there."""
    needed = ROPE_NUMBERS.get(rope.get("rope_type", "default"), ())
    for key in ("rope_theta", "partial_rotary_factor", *needed):
        if key in rope or key in needed:
            check(key, rope.get(key), f"{where}: rope", is_positive, "a positive number")
    for key in ROPE_OPTIONS:
        if rope.get(key) is not None:
            check(key, rope[key], f"{where}: rope", is_number, "a number")
    for key in ("short_factor", "long_factor") if rope.get("rope_type") == "longrope" else ():
        check(key, rope.get(key), f"{where}: rope", is_numbers, "a list of positive numbers")


def check(key: str, value: Any, where: str, is_right: Callable[[Any], bool], words: str) -> None:
    """Raise StartupError unless `is_right(value)`; `words`: what is."""
    if not is_right(value):
        raise StartupError(f"{where}: {key} must be {words}, got {shown(value)}")


def is_integer(value: Any) -> bool:
    return type(value) is int


def is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def is_depth(value: Any) -> bool:
    return is_size(value) and bool(value <= MAX_LAYERS)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # false for NaN


def is_positive(value: Any) -> bool:
    return is_number(value) and bool(value > 0)


def is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_positive, value))


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)
