"""Orion (Chen et al. 2024): llama with LayerNorm, weight and bias, instead of RMSNorm.

Config keys are those of OrionStarAI/Orion-14B-Base.
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
    "architectures": ["OrionForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_orion.OrionConfig",
        "AutoModelForCausalLM": "modeling_orion.OrionForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "max_position_embeddings": 512,
    "max_sequence_length": 512,
    "model_type": "orion",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {"orion": CONFIG}


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden = Draw(seed), config["hidden_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors: Weights = {"model.embed_tokens.weight": draw.table(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        projections(draw, tensors, layer, hidden, q=hidden, kv=kv)
        gated_layer(draw, tensors, layer, hidden, config["intermediate_size"])
        tensors[f"{layer}.input_layernorm.bias"] = draw.bias(hidden)
        tensors[f"{layer}.post_attention_layernorm.bias"] = draw.bias(hidden)
    tensors["model.norm.weight"] = draw.scale(hidden)
    tensors["model.norm.bias"] = draw.bias(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; Orion-14B report, section 3.1; the epsilon is called `rms_norm_eps`."""
    dim = config["hidden_size"] // config["num_attention_heads"]
    x = prenorm_decoder(
        weights,
        input_ids,
        config["num_hidden_layers"],
        norm=partial(layer_norm, weights, eps=config["rms_norm_eps"]),
        attention=partial(
            rotary_attention, weights, dim, angles(len(input_ids), dim, config["rope_theta"])
        ),
    )
    return linear(weights, "lm_head", x)
