"""StableLM under its first names: StableLMEpochForCausalLM (Stability AI 2023).

Llama with LayerNorm, weight and bias, and rotation of the first `rope_pct` of each head. Config
keys are those of stabilityai/stablelm-3b-4e1t and stable-code-3b.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tests.models.references.drawing import Draw, Weights, gated_layer, projections
from tests.models.references.operations import (
    angles,
    layer_norm,
    linear,
    prenorm_decoder,
    rotary_attention,
)

CONFIG: dict[str, Any] = {
    "architectures": ["StableLMEpochForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_stablelm_epoch.StableLMEpochConfig",
        "AutoModelForCausalLM": "modeling_stablelm_epoch.StableLMEpochForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "max_position_embeddings": 512,
    "model_type": "stablelm_epoch",
    "norm_eps": 1e-05,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "rope_pct": 0.25,
    "rope_theta": 1000000,
    "rotary_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.2",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "stablelm-epoch": CONFIG,
    "stablelm-epoch with q, k and v biases": {**CONFIG, "use_qkv_bias": True, "rope_pct": 0.5},
}


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden = Draw(seed), config["hidden_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors: Weights = {"model.embed_tokens.weight": draw.table(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        projections(draw, tensors, layer, hidden, q=hidden, kv=kv)
        if config.get("use_qkv_bias"):
            for part, width in (("q", hidden), ("k", kv), ("v", kv)):
                tensors[f"{layer}.self_attn.{part}_proj.bias"] = draw.bias(width)
        gated_layer(draw, tensors, layer, hidden, config["intermediate_size"])
        tensors[f"{layer}.input_layernorm.bias"] = draw.bias(hidden)
        tensors[f"{layer}.post_attention_layernorm.bias"] = draw.bias(hidden)
    tensors["model.norm.weight"] = draw.scale(hidden)
    tensors["model.norm.bias"] = draw.bias(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; StableLM-3B-4E1T report (Tow et al. 2023), section "Model"."""
    dim = config["hidden_size"] // config["num_attention_heads"]
    angle = angles(len(input_ids), int(dim * config["rope_pct"]), config["rope_theta"])
    x = prenorm_decoder(
        weights,
        input_ids,
        config["num_hidden_layers"],
        norm=partial(layer_norm, weights, eps=config["norm_eps"]),
        attention=partial(rotary_attention, weights, dim, angle),
    )
    return linear(weights, "lm_head", x)
