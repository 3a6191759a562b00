"""Aquila (BAAI 2023): llama under another class name.

Config keys are those of BAAI/Aquila-7B and AquilaChat2-34B (grouped heads). Checkpoints of the
first age carry `rotary_emb.inv_freq`. The hub's `architectures` says AquilaModel, its auto_map
AquilaForCausalLM; both are found in the wild.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tests.models.references.drawing import (
    Draw,
    Weights,
    gated_layer,
    inverse_frequencies,
    projections,
)
from tests.models.references.operations import (
    angles,
    linear,
    prenorm_decoder,
    rms_norm,
    rotary_attention,
)

CONFIG: dict[str, Any] = {
    "architectures": ["AquilaModel"],
    "auto_map": {
        "AutoConfig": "configuration_aquila.AquilaConfig",
        "AutoModelForCausalLM": "modeling_aquila.AquilaForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "max_position_embeddings": 512,
    "model_type": "aquila",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "aquila": CONFIG,
    "aquila2-34b": {
        **CONFIG,
        "architectures": ["AquilaForCausalLM"],
        "num_attention_heads": 6,
        "hidden_size": 96,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    },
}


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published; `inv_freq` where heads are not grouped (the first age)."""
    draw, hidden = Draw(seed), config["hidden_size"]
    dim = hidden // config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", config["num_attention_heads"])
    tensors: Weights = {"model.embed_tokens.weight": draw.table(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        projections(draw, tensors, layer, hidden, q=hidden, kv=kv_heads * dim)
        gated_layer(draw, tensors, layer, hidden, config["intermediate_size"])
        if "num_key_value_heads" not in config:
            tensors[f"{layer}.self_attn.rotary_emb.inv_freq"] = inverse_frequencies(dim)
    tensors["model.norm.weight"] = draw.scale(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; Touvron et al. 2023 with the keys of the config."""
    dim = config["hidden_size"] // config["num_attention_heads"]
    angle = angles(len(input_ids), dim, config.get("rope_theta", 10000.0))
    x = prenorm_decoder(
        weights,
        input_ids,
        config["num_hidden_layers"],
        norm=partial(rms_norm, weights, eps=config["rms_norm_eps"]),
        attention=partial(rotary_attention, weights, dim, angle),
    )
    return linear(weights, "lm_head", x)
