"""Families with experts, latent attention, or both."""

from __future__ import annotations

from typing import Any

from tests.models.case import Case

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1}
ROUTED |= {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7}
GROUPED: dict[str, Any] = {**ROUTED, "n_group": 4, "topk_group": 2}
LATENT: dict[str, Any] = {
    **GROUPED,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
}
QWEN: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GRANITE: dict[str, Any] = {
    **EXPERTS,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
DBRX: dict[str, Any] = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 3,
    "max_seq_len": 512,
    # transformers 5 reads its angles here and not from attn_config, where DBRX has them
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.8, "rope_theta": 500.0},
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
}
CASES_MOE: dict[str, Case] = {
    "mixtral": Case("mixtral", EXPERTS),
    "mixtral with a window": Case("mixtral", {**EXPERTS, "sliding_window": 11}),
    "phimoe": Case("phimoe", EXPERTS),
    "phimoe with biases": Case("phimoe", {**EXPERTS, "attention_bias": True, "lm_head_bias": True}),
    "granitemoe": Case("granitemoe", GRANITE),
    "granitemoeshared": Case("granitemoeshared", {**GRANITE, "shared_intermediate_size": 40}),
    "qwen2_moe": Case("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 48}),
    "qwen2_moe with dense layers": Case(
        "qwen2_moe",
        {**QWEN, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": Case("qwen3_moe", {**QWEN, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3_moe not renormalised": Case(
        "qwen3_moe", {**QWEN, "head_dim": 24, "norm_topk_prob": False}
    ),
    "olmoe": Case("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.9}),
    "flex_olmo": Case("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek v2": Case("deepseek_v2", {**LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek v2 lite": Case("deepseek_v2", {**LATENT, "q_lora_rank": None}),
    "deepseek v2 stretched": Case(
        "deepseek_v2",
        {**LATENT, "q_lora_rank": None, "rope_parameters": {**YARN, "mscale_all_dim": 0.707}},
    ),
    "deepseek v3": Case("deepseek_v3", LATENT),
    "deepseek v3 stretched": Case("deepseek_v3", {**LATENT, "rope_parameters": YARN}),
    "glm4_moe": Case("glm4_moe", {**GROUPED, "head_dim": 16, "use_qk_norm": True}),
    "glm4_moe with biases": Case("glm4_moe", {**GROUPED, "head_dim": 16, "attention_bias": True}),
    "glm4_moe_lite": Case("glm4_moe_lite", LATENT),
    "dots1": Case("dots1", {**GROUPED, "head_dim": 16, "sliding_window": 9}),
    "ernie4_5_moe": Case(
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
        },
    ),
    "dbrx": Case("dbrx", DBRX),
    "gpt_oss": Case("gpt_oss", {**EXPERTS, "head_dim": 16, "sliding_window": 9}),
    "llama4": Case(
        "llama4_text",
        {
            **EXPERTS,
            "num_hidden_layers": 5,
            "head_dim": 16,
            "attention_chunk_size": 16,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 48,
            "floor_scale": 16,
        },
    ),
    "minimax_m2": Case("minimax_m2", {**EXPERTS, "head_dim": 16}),
    "hunyuan_v1_moe": Case(
        "hunyuan_v1_moe", {"head_dim": 16, "num_experts": 4, "moe_topk": 2, "use_cla": False}
    ),
}
