"""EXAONE 3 (LG AI Research 2024): llama under GPT-2-like names.

`c_fc_0` is the gate. Config keys are those of LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct (no scaling) and
EXAONE-3.5-7.8B-Instruct (llama 3's scaling).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.models.references.drawing import Draw, Weights, inverse_frequencies
from tests.models.references.operations import (
    attend,
    heads,
    linear,
    llama3_frequencies,
    positions_times,
    rms_norm,
    rotate_halves,
    swiglu,
)

CONFIG: dict[str, Any] = {
    "activation_function": "silu",
    "architectures": ["ExaoneForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_exaone.ExaoneConfig",
        "AutoModelForCausalLM": "modeling_exaone.ExaoneForCausalLM",
        "AutoModelForSequenceClassification": "modeling_exaone.ExaoneForSequenceClassification",
    },
    "bos_token_id": 1,
    "embed_dropout": 0.0,
    "eos_token_id": 2,
    "hidden_size": 96,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 512,
    "model_type": "exaone",
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_layers": 3,
    "pad_token_id": 0,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.0",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "exaone-3.0": CONFIG,
    "exaone-3.5": {
        **CONFIG,
        "head_dim": 16,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 1000000.0,
        "transformers_version": "4.43.0",
    },
}


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden, ffn = Draw(seed), config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors: Weights = {"transformer.wte.weight": draw.table(config["vocab_size"], hidden)}
    shapes = {
        "attn.attention.q_proj": (hidden, hidden),
        "attn.attention.k_proj": (kv, hidden),
        "attn.attention.v_proj": (kv, hidden),
        "attn.attention.out_proj": (hidden, hidden),
        "mlp.c_fc_0": (ffn, hidden),
        "mlp.c_fc_1": (ffn, hidden),
        "mlp.c_proj": (hidden, ffn),
    }
    for i in range(config["num_layers"]):
        layer = f"transformer.h.{i}"
        for name, shape in shapes.items():
            tensors[f"{layer}.{name}.weight"] = draw.matrix(*shape)
        tensors[f"{layer}.ln_1.weight"] = draw.scale(hidden)
        tensors[f"{layer}.ln_2.weight"] = draw.scale(hidden)
    tensors["transformer.ln_f.weight"] = draw.scale(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; EXAONE 3.0 report (2024), section 2.1."""
    eps, dim = config["layer_norm_epsilon"], config["hidden_size"] // config["num_attention_heads"]
    frequencies = inverse_frequencies(dim, config["rope_theta"])
    if config["rope_scaling"]:
        frequencies = llama3_frequencies(dim, config["rope_theta"], config["rope_scaling"])
    angle = positions_times(len(input_ids), frequencies)

    x = weights["transformer.wte.weight"][input_ids]
    for i in range(config["num_layers"]):
        layer, normed = f"transformer.h.{i}", rms_norm(weights, f"transformer.h.{i}.ln_1", x, eps)
        name = f"{layer}.attn.attention"
        q, k, v = (heads(linear(weights, f"{name}.{part}_proj", normed), dim) for part in "qkv")
        mixed = attend(rotate_halves(q, angle), rotate_halves(k, angle), v)
        x = x + linear(weights, f"{name}.out_proj", mixed)
        normed, mlp = rms_norm(weights, f"{layer}.ln_2", x, eps), f"{layer}.mlp"
        x = x + swiglu(
            weights, normed, gate=f"{mlp}.c_fc_0", up=f"{mlp}.c_fc_1", down=f"{mlp}.c_proj"
        )
    return linear(weights, "lm_head", rms_norm(weights, "transformer.ln_f", x, eps))
