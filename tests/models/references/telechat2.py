"""TeleChat 2 (China Telecom 2024): llama under Bloom-like names with a packed `key_value`.

Rows of `key_value` lie head by head: for each key-value head its key, then its value. `dense` and
`mlp.down_proj` have biases. Within `base_seqlen` tokens the rotary base is 10000; past it the
published code stretches it, which is not written here. Config keys are those of
Tele-AI/TeleChat2-7B.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tests.models.references.drawing import Draw, Weights
from tests.models.references.operations import (
    angles,
    attend,
    heads,
    linear,
    rms_norm,
    rotate_halves,
)

CONFIG: dict[str, Any] = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["TeleChat2ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_telechat2.Telechat2Config",
        "AutoModelForCausalLM": "modeling_telechat2.Telechat2ForCausalLM",
    },
    "base_seqlen": 512,
    "bos_token_id": 1,
    "embed_layernorm": False,
    "eos_token_id": 2,
    "ffn_hidden_size": 88,
    "flash_attn": True,
    "hidden_dropout": 0.0,
    "hidden_size": 96,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "logn": False,
    "model_type": "telechat",
    "n_head": 6,
    "n_layer": 3,
    "num_key_value_heads": 6,
    "pad_token_id": 3,
    "seq_length": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "training_seqlen": 512,
    "transformers_version": "4.24.0",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "telechat2": CONFIG,
    "telechat2 with grouped heads": {**CONFIG, "num_key_value_heads": 2},
}


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden, ffn = Draw(seed), config["hidden_size"], config["ffn_hidden_size"]
    kv = config["num_key_value_heads"] * hidden // config["n_head"]
    tensors: Weights = {
        "transformer.word_embeddings.weight": draw.table(config["vocab_size"], hidden)
    }
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = draw.scale(hidden)
        tensors[f"{layer}.self_attention.query.weight"] = draw.matrix(hidden, hidden)
        tensors[f"{layer}.self_attention.key_value.weight"] = draw.matrix(2 * kv, hidden)
        tensors[f"{layer}.self_attention.dense.weight"] = draw.matrix(hidden, hidden)
        tensors[f"{layer}.self_attention.dense.bias"] = draw.bias(hidden)
        tensors[f"{layer}.post_attention_layernorm.weight"] = draw.scale(hidden)
        tensors[f"{layer}.mlp.gate_proj.weight"] = draw.matrix(ffn, hidden)
        tensors[f"{layer}.mlp.up_proj.weight"] = draw.matrix(ffn, hidden)
        tensors[f"{layer}.mlp.down_proj.weight"] = draw.matrix(hidden, ffn)
        tensors[f"{layer}.mlp.down_proj.bias"] = draw.bias(hidden)
    tensors["transformer.ln_f.weight"] = draw.scale(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; TeleChat report (Wang et al. 2024), section 3."""
    tokens, eps = len(input_ids), config["layer_norm_epsilon"]
    assert tokens <= config["base_seqlen"]
    dim = config["hidden_size"] // config["n_head"]
    angle = angles(tokens, dim, 10000.0)

    x = weights["transformer.word_embeddings.weight"][input_ids]
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        normed = rms_norm(weights, f"{layer}.input_layernorm", x, eps)
        q = heads(linear(weights, f"{layer}.self_attention.query", normed), dim)
        pairs = linear(weights, f"{layer}.self_attention.key_value", normed)
        k, v = pairs.unflatten(-1, (-1, 2, dim)).unbind(2)
        mixed = attend(rotate_halves(q, angle), rotate_halves(k, angle), v)
        x = x + linear(weights, f"{layer}.self_attention.dense", mixed)
        normed, mlp = rms_norm(weights, f"{layer}.post_attention_layernorm", x, eps), f"{layer}.mlp"
        gated = F.silu(linear(weights, f"{mlp}.gate_proj", normed))
        x = x + linear(
            weights, f"{mlp}.down_proj", gated * linear(weights, f"{mlp}.up_proj", normed)
        )
    return linear(weights, "lm_head", rms_norm(weights, "transformer.ln_f", x, eps))
