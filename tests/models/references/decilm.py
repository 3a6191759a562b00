"""DeciLM, first form (Deci 2023): llama whose number of key-value heads differs by layer.

Config keys are those of Deci/DeciLM-7B: `num_key_value_heads_per_layer` instead of
`num_key_value_heads`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tests.models.references.drawing import Draw, Weights, gated_layer, projections
from tests.models.references.operations import (
    angles,
    linear,
    prenorm_decoder,
    rms_norm,
    rotary_attention,
)

CONFIG: dict[str, Any] = {
    "architectures": ["DeciLMForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_decilm.DeciLMConfig",
        "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 96,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "max_position_embeddings": 512,
    "model_type": "deci",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads_per_layer": [2, 1, 6, 3],
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.1",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "decilm": CONFIG,
    "decilm with equal layers": {**CONFIG, "num_key_value_heads_per_layer": [2, 2, 2, 2]},
}


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden = Draw(seed), config["hidden_size"]
    dim = hidden // config["num_attention_heads"]
    tensors: Weights = {"model.embed_tokens.weight": draw.table(config["vocab_size"], hidden)}
    for i, kv_heads in enumerate(config["num_key_value_heads_per_layer"]):
        layer = f"model.layers.{i}"
        projections(draw, tensors, layer, hidden, q=hidden, kv=kv_heads * dim)
        gated_layer(draw, tensors, layer, hidden, config["intermediate_size"])
    tensors["model.norm.weight"] = draw.scale(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; the model card of Deci/DeciLM-7B: variable grouped-query attention."""
    dim = config["hidden_size"] // config["num_attention_heads"]
    angle = angles(len(input_ids), dim, config["rope_theta"])
    x = prenorm_decoder(
        weights,
        input_ids,
        config["num_hidden_layers"],
        norm=partial(rms_norm, weights, eps=config["rms_norm_eps"]),
        attention=partial(rotary_attention, weights, dim, angle),
    )
    return linear(weights, "lm_head", x)
