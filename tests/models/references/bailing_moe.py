"""Ling, the first (Ling team 2025): DeepSeekMoE's layers under other names, packed q, k and v.

`query_key_value` holds all query heads, then the keys, then the values. `norm_head` divides each
column of `lm_head` (one hidden dim over the whole vocabulary) by its length plus 1e-7. Config keys
are those of inclusionAI/Ling-lite and Ling-lite-1.5.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tests.models.references.drawing import Draw, Weights
from tests.models.references.operations import (
    angles,
    attend,
    heads,
    linear,
    mixture,
    rms_norm,
    rotate_halves,
    swiglu,
)

CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_bailing_moe.BailingMoeConfig",
        "AutoModel": "modeling_bailing_moe.BailingMoeModel",
        "AutoModelForCausalLM": "modeling_bailing_moe.BailingMoeForCausalLM",
    },
    "eos_token_id": 2,
    "pad_token_id": 2,
    "first_k_dense_replace": 0,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.006,
    "intermediate_size": 24,
    "max_position_embeddings": 512,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 24,
    "num_experts": 7,
    "num_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "vocab_size": 256,
    "output_router_logits": False,
    "embedding_dropout": 0.0,
    "norm_head": False,
    "norm_softmax": False,
    "output_dropout": 0.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bailing-moe": CONFIG,
    "bailing-moe with a normed head": {**CONFIG, "norm_head": True},
    "bailing-moe with a dense layer": {
        **CONFIG,
        "first_k_dense_replace": 1,
        "intermediate_size": 88,
    },
    "bailing-moe with q, k and v biases": {**CONFIG, "use_qkv_bias": True},
}


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden, count = Draw(seed), config["hidden_size"], config["num_attention_heads"]
    packed = (count + 2 * config["num_key_value_heads"]) * (hidden // count)
    tensors: Weights = {"model.word_embeddings.weight": draw.table(config["vocab_size"], hidden)}

    def gated(name: str, width: int) -> None:
        tensors[f"{name}.gate_proj.weight"] = draw.matrix(width, hidden)
        tensors[f"{name}.up_proj.weight"] = draw.matrix(width, hidden)
        tensors[f"{name}.down_proj.weight"] = draw.matrix(hidden, width)

    for i in range(config["num_hidden_layers"]):
        layer, width = f"model.layers.{i}", config["moe_intermediate_size"]
        tensors[f"{layer}.input_layernorm.weight"] = draw.scale(hidden)
        tensors[f"{layer}.attention.query_key_value.weight"] = draw.matrix(packed, hidden)
        if config["use_qkv_bias"]:
            tensors[f"{layer}.attention.query_key_value.bias"] = draw.bias(packed)
        tensors[f"{layer}.attention.dense.weight"] = draw.matrix(hidden, hidden)
        tensors[f"{layer}.post_attention_layernorm.weight"] = draw.scale(hidden)
        if i < config["first_k_dense_replace"]:
            gated(f"{layer}.mlp", config["intermediate_size"])
            continue
        tensors[f"{layer}.mlp.gate.weight"] = draw.matrix(config["num_experts"], hidden)
        for e in range(config["num_experts"]):
            gated(f"{layer}.mlp.experts.{e}", width)
        gated(f"{layer}.mlp.shared_experts", width * config["num_shared_experts"])
    tensors["model.norm.weight"] = draw.scale(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; Ling report (2025), section 2, and the published configs."""
    count, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // count
    angle = angles(len(input_ids), dim, config["rope_theta"])
    norm = partial(rms_norm, weights, eps=config["rms_norm_eps"])

    def attention(name: str, x: Tensor) -> Tensor:
        packed = heads(linear(weights, f"{name}.query_key_value", x), dim)
        q, k, v = packed.split([count, kv_heads, kv_heads], dim=1)
        mixed = attend(rotate_halves(q, angle), rotate_halves(k, angle), v)
        return linear(weights, f"{name}.dense", mixed)

    def gated(name: str, x: Tensor) -> Tensor:
        return swiglu(weights, x, **{p: f"{name}.{p}_proj" for p in ("gate", "up", "down")})

    def experts(name: str, x: Tensor) -> Tensor:
        chances = linear(weights, f"{name}.gate", x).softmax(-1)
        routed = mixture(
            x,
            chances,
            config["num_experts_per_tok"],
            lambda number, token: gated(f"{name}.experts.{number}", token),
            renormalise=config["norm_topk_prob"],
        )
        return routed + gated(f"{name}.shared_experts", x)

    x = weights["model.word_embeddings.weight"][input_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        x = x + attention(f"{layer}.attention", norm(f"{layer}.input_layernorm", x))
        mlp = gated if i < config["first_k_dense_replace"] else experts
        x = x + mlp(f"{layer}.mlp", norm(f"{layer}.post_attention_layernorm", x))
    head = weights["lm_head.weight"]
    if config["norm_head"]:
        head = head / (head.norm(dim=0, keepdim=True) + 1e-7)
    return norm("model.norm", x) @ head.T
