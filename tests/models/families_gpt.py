"""Families that resemble GPT, and MiniCPM 3: see `families`."""

from __future__ import annotations

from typing import Any

from tests.models.case import Case

GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
ROTATED: dict[str, Any] = {**GPT, "rotary_dim": 10}
NEO: dict[str, Any] = {"num_heads": 4, "window_size": 9}
MPT: dict[str, Any] = {"d_model": 96, "n_layers": 3, "n_heads": 6, "max_seq_len": 512}
OPT: dict[str, Any] = {"ffn_dim": 96, "word_embed_proj_dim": 64}
XGLM: dict[str, Any] = {"d_model": 64, "num_layers": 3, "attention_heads": 4, "ffn_dim": 96}
FALCON_RW: dict[str, Any] = {
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
}
GROUPED: dict[str, Any] = {"new_decoder_architecture": True, "num_kv_heads": 2}
MINICPM3: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "num_key_value_heads": 4,
    "scale_emb": 3,
    "dim_model_base": 32,
}

CASES_GPT: dict[str, Case] = {
    "gpt_bigcode": Case("gpt_bigcode", GPT),
    "gpt_bigcode without shared heads": Case("gpt_bigcode", {**GPT, "multi_query": False}),
    "gpt_neo": Case("gpt_neo", NEO),
    "gpt_neo of a given width": Case("gpt_neo", {**NEO, "intermediate_size": None}),
    "gptj": Case("gptj", ROTATED),
    "codegen": Case("codegen", {**ROTATED, "n_embd": 128, "n_head": 8}),
    "gpt_neox": Case("gpt_neox", {"hidden_size": 96}),
    "gpt_neox one after the other": Case(
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 25000.0,
                "partial_rotary_factor": 0.5,
                "factor": 2.0,
            },
        },
    ),
    "gpt_neox_japanese": Case("gpt_neox_japanese"),
    "falcon 7b": Case("falcon", {}),
    "falcon 40b": Case("falcon", GROUPED),
    "falcon 11b": Case("falcon", {**GROUPED, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 100}),
    "falcon one after the other": Case("falcon", {"parallel_attn": False, "multi_query": False}),
    # transformers' eager implementation adds the biases twice, in the mask and to the scores.
    "falcon rw": Case("falcon", FALCON_RW, attention="sdpa"),
    "bloom": Case("bloom", {"n_layer": 3, "n_head": 4}),
    "bloom with 6 heads": Case("bloom", {"hidden_size": 96, "n_layer": 2, "n_head": 6}),
    "bloom with 12 heads, normed residuals": Case(
        "bloom",
        {
            "hidden_size": 96,
            "n_layer": 2,
            "n_head": 12,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "mpt": Case("mpt", MPT),
    "mpt clipped": Case(
        "mpt", {**MPT, "n_heads": 4, "attn_config": {"clip_qkv": 0.4, "softmax_scale": 0.3}}
    ),
    "mpt with 12 heads": Case("mpt", {**MPT, "n_heads": 12}),
    "opt": Case("opt", OPT),
    "opt with norms behind": Case(
        "opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 40}
    ),
    "opt without biases": Case(
        "opt", {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}
    ),
    "biogpt": Case("biogpt"),
    "xglm": Case("xglm", XGLM),
    "openai-gpt": Case("openai-gpt", GPT),
    "minicpm3": Case("minicpm3", MINICPM3),
    "minicpm3 of one matrix for queries": Case(
        "minicpm3",
        {**MINICPM3, "q_lora_rank": None, "scale_depth": None, "attention_bias": True},
    ),
}
