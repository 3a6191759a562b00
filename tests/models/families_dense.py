"""Dense families that resemble Llama: see `families`.

Options that published checkpoints use have cases of their own.
"""

from __future__ import annotations

from tests.models.case import Case

ROPE = {"rope_theta": 10000.0}
LINEAR = {**ROPE, "rope_type": "linear", "factor": 2.5}
DYNAMIC = {**ROPE, "rope_type": "dynamic", "factor": 2.5}
TRAINED = {**ROPE, "original_max_position_embeddings": 32}
YARN = {**TRAINED, "rope_type": "yarn", "factor": 4.0}
GROWING = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
HALF = {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}
# A tiny head of 16 has 8 factors.
LONGROPE = {
    **TRAINED,
    "rope_type": "longrope",
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 1.9],
    "long_factor": [1.0, 1.4, 2.0, 2.9, 4.1, 5.8, 7.7, 9.3],
}
LAYERS_OF_TWO_KINDS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "sliding_window": 9,
}

LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}

ROPES: dict[str, Case] = {
    "rope linear": Case("llama", {"rope_parameters": LINEAR}),
    "rope dynamic within the trained length": Case("llama", {"rope_parameters": DYNAMIC}),
    "rope yarn": Case("llama", {"rope_parameters": YARN}),
    "rope yarn with mscale": Case(
        "llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}}
    ),
    "rope yarn with its own sharpness": Case(
        "llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0}}
    ),
    "rope yarn not truncated": Case("llama", {"rope_parameters": {**YARN, "truncate": False}}),
    "rope of a part": Case("stablelm", {"rope_parameters": HALF}),
}

LLAMAS: dict[str, Case] = {
    "llama with biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "seed_oss": Case("seed_oss", {"head_dim": 24}),
    "seed_oss with every bias": Case(
        "seed_oss", {"head_dim": 24, "attention_out_bias": True, "mlp_bias": True}
    ),
    "arcee": Case("arcee"),
    "arcee with biases": Case("arcee", {"attention_bias": True, "mlp_bias": True}),
    "smollm3": Case("smollm3", {"num_hidden_layers": 4}),
    "smollm3 with windows": Case(
        "smollm3", {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 9}
    ),
    "ministral": Case("ministral", {"head_dim": 24, **LAYERS_OF_TWO_KINDS}),
    "ministral3": Case("ministral3", {"head_dim": 24, "rope_parameters": GROWING}),
    "ministral3 with a window": Case(
        "ministral3", {"head_dim": 24, "rope_parameters": GROWING, "sliding_window": 9}
    ),
    "helium": Case("helium", {"head_dim": 16}),
    "helium with biases": Case(
        "helium", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}
    ),
    "ernie4_5": Case("ernie4_5", {"head_dim": 24}),
    "ernie4_5 with biases, untied": Case(
        "ernie4_5", {"head_dim": 24, "use_bias": True, "tie_word_embeddings": False}
    ),
    "hunyuan": Case("hunyuan_v1_dense", {"head_dim": 24}),
    "hunyuan with alpha": Case(
        "hunyuan_v1_dense",
        {"head_dim": 24, "rope_parameters": {**DYNAMIC, "alpha": 50.0, "factor": 1.0}},
    ),
    "internlm3": Case("internlm3", {"head_dim": 24}, architecture="InternLM3ForCausalLM"),
    "iquestcoder": Case("iquestcoder", {"head_dim": 24}, architecture="IQuestCoderForCausalLM"),
    "cwm": Case("cwm", {"head_dim": 24, "num_hidden_layers": 5, "sliding_window": 9}),
    "jais2": Case("jais2"),
    "jais2 without biases": Case("jais2", {"attention_bias": False, "mlp_bias": False}),
    "nanochat": Case("nanochat"),
    "bitnet": Case("bitnet"),
    "apertus": Case("apertus"),
    "apertus 1.5": Case("apertus1p5_text"),
    "youtu": Case("youtu", LATENT),
    "youtu with one matrix for queries, stretched": Case(
        "youtu", {**LATENT, "q_lora_rank": None, "rope_parameters": {**YARN, "mscale_all_dim": 0.7}}
    ),
    "apertus with biases": Case("apertus", {"attention_bias": True, "rope_parameters": ROPE}),
}

MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
GRANITES: dict[str, Case] = {
    "granite": Case("granite", MULTIPLIERS),
    "granite with biases, tied": Case(
        "granite",
        {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "granite with windows": Case(
        "granite_swa", {**MULTIPLIERS, "num_hidden_layers": 5, "sliding_window": 9}
    ),
    "granite with windows and thetas": Case(
        "granite_swa",
        {**MULTIPLIERS, "sliding_window": 9, "layer_rope_theta": [0, 10000, 500000.0]},
    ),
    "hyperclovax": Case("hyperclovax", MULTIPLIERS),
    "hyperclovax without norms behind": Case("hyperclovax", {"use_post_norm": False}),
}

GEMMAS: dict[str, Case] = {
    "gemma untied": Case("gemma", {"head_dim": 24, "tie_word_embeddings": False}),
    "gemma2 without caps": Case(
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma2 with low caps": Case(
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 4,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 1.0,
        },
    ),
    "gemma3 stretched": Case(
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "vaultgemma": Case("vaultgemma", {"head_dim": 16, "sliding_window": 8}),
}

PHIS: dict[str, Case] = {
    "phi": Case("phi"),
    "phi with norms of heads": Case("phi", {"qk_layernorm": True}),
    "phi3": Case("phi3"),
    "phi3 with a window": Case("phi3", {"sliding_window": 9}),
    "phi3 with short factors": Case(
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
        context=128,
    ),
    "phi3 with long factors": Case(
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
    "phi4 mini": Case(
        "phi3",
        {
            "hidden_size": 96,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.67},
            "original_max_position_embeddings": 32,
            "tie_word_embeddings": True,
        },
    ),
}

LAYER_NORMS: dict[str, Case] = {
    "starcoder2": Case("starcoder2"),
    "starcoder2 with a window, untied": Case(
        "starcoder2", {"sliding_window": 9, "tie_word_embeddings": False}
    ),
    "starcoder2 without biases": Case("starcoder2", {"use_bias": False}),
    "stablelm": Case("stablelm"),
    "stablelm with biases": Case("stablelm", {"use_qkv_bias": True}),
    "stablelm side by side": Case("stablelm", {"use_parallel_residual": True}),
    "stablelm with norms of heads": Case(
        "stablelm", {"qk_layernorm": True, "use_parallel_residual": True}
    ),
    "nemotron": Case("nemotron", {"head_dim": 24}),
    "nemotron with biases": Case(
        "nemotron", {"head_dim": 24, "attention_bias": True, "mlp_bias": True}
    ),
    "persimmon": Case("persimmon"),
    "persimmon without norms of heads": Case("persimmon", {"qk_layernorm": False}),
    "cohere": Case("cohere"),
    "cohere with norms of heads": Case("cohere", {"use_qk_norm": True, "attention_bias": True}),
    "cohere2": Case("cohere2", {"num_hidden_layers": 5, "sliding_window": 9}),
}

OTHER_NORMS: dict[str, Case] = {
    "olmo": Case("olmo"),
    "olmo clipped": Case("olmo", {"clip_qkv": 0.5, "attention_bias": True}),
    "olmo2": Case("olmo2"),
    "olmo2 with biases": Case("olmo2", {"attention_bias": True}),
    "olmo3": Case("olmo3", {"num_hidden_layers": 5, "sliding_window": 9}),
    "olmo3 stretched": Case(
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": {**YARN, "attention_factor": 1.2},
                "sliding_attention": {**ROPE, "rope_type": "default"},
            },
        },
    ),
    "exaone4": Case("exaone4", {"num_hidden_layers": 5, "sliding_window": 9}),
    "exaone4 without windows": Case(
        "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}
    ),
    "glm": Case("glm", {"head_dim": 24}),
    "glm without biases": Case("glm", {"head_dim": 24, "attention_bias": False}),
    "glm4": Case("glm4", {"head_dim": 24}),
    "glm4 without biases": Case("glm4", {"head_dim": 24, "attention_bias": False}),
}

CASES_DENSE: dict[str, Case] = {
    **ROPES,
    **LLAMAS,
    **GRANITES,
    **GEMMAS,
    **PHIS,
    **LAYER_NORMS,
    **OTHER_NORMS,
}
