"""InternLM 2 (Cai et al. 2024): llama's maths under its own names and one packed `wqkv`.

Rows of `wqkv` lie group by group: for each key-value head its query heads, its key, its value.
Config keys are those of internlm/internlm2-7b and internlm2_5-7b-chat (dynamic NTK).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.models.references.drawing import Draw, Weights
from tests.models.references.operations import (
    angles,
    attend,
    dynamic_base,
    linear,
    rms_norm,
    rotate_halves,
    swiglu,
)

CONFIG: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
    },
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 96,
    "initializer_range": 0.02,
    "intermediate_size": 104,
    "max_position_embeddings": 512,
    "model_type": "internlm2",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.0",
    "use_cache": True,
    "vocab_size": 256,
    "pretraining_tp": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "internlm2": CONFIG,
    "internlm2 with biases": {**CONFIG, "bias": True},
    "internlm2.5-chat": {**CONFIG, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
}


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden, ffn = Draw(seed), config["hidden_size"], config["intermediate_size"]
    dim = hidden // config["num_attention_heads"]
    packed = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * dim
    tensors: Weights = {"model.tok_embeddings.weight": draw.table(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.attention.wqkv.weight"] = draw.matrix(packed, hidden)
        tensors[f"{layer}.attention.wo.weight"] = draw.matrix(hidden, hidden)
        if config["bias"]:
            tensors[f"{layer}.attention.wqkv.bias"] = draw.bias(packed)
            tensors[f"{layer}.attention.wo.bias"] = draw.bias(hidden)
        tensors[f"{layer}.feed_forward.w1.weight"] = draw.matrix(ffn, hidden)
        tensors[f"{layer}.feed_forward.w3.weight"] = draw.matrix(ffn, hidden)
        tensors[f"{layer}.feed_forward.w2.weight"] = draw.matrix(hidden, ffn)
        tensors[f"{layer}.attention_norm.weight"] = draw.scale(hidden)
        tensors[f"{layer}.ffn_norm.weight"] = draw.scale(hidden)
    tensors["model.norm.weight"] = draw.scale(hidden)
    tensors["output.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def unpack(packed: Tensor, config: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """[T, (H + 2K) * D] -> q [T, H, D], k [T, K, D], v [T, K, D]."""
    kv_heads = config["num_key_value_heads"]
    shared = config["num_attention_heads"] // kv_heads
    dim = config["hidden_size"] // config["num_attention_heads"]
    grouped = packed.reshape(-1, kv_heads, shared + 2, dim)
    return grouped[:, :, :shared].flatten(1, 2), grouped[:, :, shared], grouped[:, :, shared + 1]


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; InternLM2 technical report, section 2.3.

    With dynamic NTK the base follows from the length of `input_ids`, as in one prefill of them.
    """
    tokens, eps = len(input_ids), config["rms_norm_eps"]
    dim, base = config["hidden_size"] // config["num_attention_heads"], config["rope_theta"]
    if config["rope_scaling"]:
        assert config["rope_scaling"]["type"] == "dynamic"
        factor, trained = config["rope_scaling"]["factor"], config["max_position_embeddings"]
        base = dynamic_base(base, dim, factor=factor, tokens=tokens, trained=trained)
    angle = angles(tokens, dim, base)

    x = weights["model.tok_embeddings.weight"][input_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        normed = rms_norm(weights, f"{layer}.attention_norm", x, eps)
        q, k, v = unpack(linear(weights, f"{layer}.attention.wqkv", normed), config)
        mixed = attend(rotate_halves(q, angle), rotate_halves(k, angle), v)
        x = x + linear(weights, f"{layer}.attention.wo", mixed)
        normed = rms_norm(weights, f"{layer}.ffn_norm", x, eps)
        mlp = f"{layer}.feed_forward"
        x = x + swiglu(weights, normed, gate=f"{mlp}.w1", up=f"{mlp}.w3", down=f"{mlp}.w2")
    return linear(weights, "output", rms_norm(weights, "model.norm", x, eps))
