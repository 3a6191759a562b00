"""DeepSeekMoE, the first (Dai et al. 2024): llama's attention, many small experts, shared ones.

Every token goes through the shared experts (one MLP as wide as all of them) and through the
likeliest routed ones, weighted by their softmax over all experts, made to sum to one only where
`norm_topk_prob` says so. The first `first_k_dense_replace` layers, and those whose number is no
multiple of `moe_layer_freq`, have a plain MLP. Config keys are those of
deepseek-ai/deepseek-moe-16b-base.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tests.models.references.drawing import Draw, Weights, projections
from tests.models.references.operations import (
    angles,
    linear,
    mixture,
    rms_norm,
    rotary_attention,
    swiglu,
)

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "max_position_embeddings": 512,
    "model_type": "deepseek",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_routed_experts": 7,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-moe": CONFIG,
    "deepseek-moe renormalised": {**CONFIG, "norm_topk_prob": True},
    "deepseek-moe every other layer": {**CONFIG, "moe_layer_freq": 2, "num_key_value_heads": 2},
    "deepseek-moe without shared experts": {**CONFIG, "n_shared_experts": None},
}


def has_experts(config: dict[str, Any], layer: int) -> bool:
    return layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden = Draw(seed), config["hidden_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors: Weights = {"model.embed_tokens.weight": draw.table(config["vocab_size"], hidden)}

    def gated(name: str, width: int) -> None:
        tensors[f"{name}.gate_proj.weight"] = draw.matrix(width, hidden)
        tensors[f"{name}.up_proj.weight"] = draw.matrix(width, hidden)
        tensors[f"{name}.down_proj.weight"] = draw.matrix(hidden, width)

    for i in range(config["num_hidden_layers"]):
        layer, width = f"model.layers.{i}", config["moe_intermediate_size"]
        projections(draw, tensors, layer, hidden, q=hidden, kv=kv)
        tensors[f"{layer}.input_layernorm.weight"] = draw.scale(hidden)
        tensors[f"{layer}.post_attention_layernorm.weight"] = draw.scale(hidden)
        if not has_experts(config, i):
            gated(f"{layer}.mlp", config["intermediate_size"])
            continue
        tensors[f"{layer}.mlp.gate.weight"] = draw.matrix(config["n_routed_experts"], hidden)
        for e in range(config["n_routed_experts"]):
            gated(f"{layer}.mlp.experts.{e}", width)
        if config["n_shared_experts"]:
            gated(f"{layer}.mlp.shared_experts", width * config["n_shared_experts"])
    tensors["model.norm.weight"] = draw.scale(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; DeepSeekMoE, equations 9 to 11."""
    dim = config["hidden_size"] // config["num_attention_heads"]
    angle = angles(len(input_ids), dim, config["rope_theta"])
    norm = partial(rms_norm, weights, eps=config["rms_norm_eps"])

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
        return routed + gated(f"{name}.shared_experts", x) if config["n_shared_experts"] else routed

    x = weights["model.embed_tokens.weight"][input_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        normed = norm(f"{layer}.input_layernorm", x)
        x = x + rotary_attention(weights, dim, angle, f"{layer}.self_attn", normed)
        mlp = experts if has_experts(config, i) else gated
        x = x + mlp(f"{layer}.mlp", norm(f"{layer}.post_attention_layernorm", x))
    return linear(weights, "lm_head", norm("model.norm", x))
