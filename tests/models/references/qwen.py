"""Qwen 1 (Bai et al. 2023): llama's maths under GPT-2-like names, with a bias on q, k and v alone.

`intermediate_size` counts both halves of the gated MLP: `w1` and `w2` are half as wide each, and
the gate is `w2`. Past `seq_length` tokens two methods of the report's section 2.4 act:
`use_logn_attn` scales the query at position p (from one) by log(p) / log(seq_length), and
`use_dynamic_ntk` grows the rotary base in steps by the length of the prompt. Config keys are those
of Qwen/Qwen-7B and Qwen/Qwen-72B.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.models.references.drawing import Draw, Weights
from tests.models.references.operations import (
    angles,
    attend,
    heads,
    linear,
    rms_norm,
    rotate_halves,
    swiglu,
)

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 64,
    "intermediate_size": 176,
    "initializer_range": 0.02,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 512,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 512,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen": CONFIG,
    "qwen-72b": {
        **CONFIG,
        "rope_theta": 1000000,
        "rotary_emb_base": 1000000,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "layer_norm_epsilon": 1e-05,
        "softmax_in_fp32": False,
    },
    "qwen with biases": {**CONFIG, "no_bias": False},
    "qwen partly rotary": {**CONFIG, "rotary_pct": 0.5},
    "qwen past its length, log-n": {**CONFIG, "seq_length": 16, "use_dynamic_ntk": False},
    "qwen past its length, ntk": {**CONFIG, "seq_length": 16, "use_logn_attn": False},
    "qwen past its length": {**CONFIG, "seq_length": 16},
}


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden = Draw(seed), config["hidden_size"]
    packed = config["kv_channels"] * config["num_attention_heads"]
    ffn = config["intermediate_size"] // 2
    tensors: Weights = {"transformer.wte.weight": draw.table(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        tensors[f"{layer}.ln_1.weight"] = draw.scale(hidden)
        tensors[f"{layer}.attn.c_attn.weight"] = draw.matrix(3 * packed, hidden)
        tensors[f"{layer}.attn.c_attn.bias"] = draw.bias(3 * packed)
        tensors[f"{layer}.attn.c_proj.weight"] = draw.matrix(hidden, packed)
        tensors[f"{layer}.ln_2.weight"] = draw.scale(hidden)
        tensors[f"{layer}.mlp.w1.weight"] = draw.matrix(ffn, hidden)
        tensors[f"{layer}.mlp.w2.weight"] = draw.matrix(ffn, hidden)
        tensors[f"{layer}.mlp.c_proj.weight"] = draw.matrix(hidden, ffn)
        if not config["no_bias"]:
            tensors[f"{layer}.attn.c_proj.bias"] = draw.bias(hidden)
            tensors[f"{layer}.mlp.w1.bias"] = draw.bias(ffn)
            tensors[f"{layer}.mlp.w2.bias"] = draw.bias(ffn)
            tensors[f"{layer}.mlp.c_proj.bias"] = draw.bias(hidden)
    tensors["transformer.ln_f.weight"] = draw.scale(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def ntk_alpha(config: dict[str, Any], prompt_length: int) -> float:
    """1 up to `seq_length` tokens, 3 up to twice as many, 7 up to four times, …"""
    if not config["use_dynamic_ntk"]:
        return 1
    return max(2 ** math.ceil(math.log2(prompt_length / config["seq_length"]) + 1) - 1, 1)


def query_scale(config: dict[str, Any], tokens: int) -> Tensor:
    """The log-n factor of each position, [T]."""
    trained = config["seq_length"] if config["use_logn_attn"] else tokens
    factors = [math.log(p) / math.log(trained) if p > trained else 1 for p in range(1, tokens + 1)]
    return torch.tensor(factors, dtype=torch.float32)


def forward(
    config: dict[str, Any],
    weights: Weights,
    input_ids: list[int],
    *,
    prompt_length: int | None = None,
) -> Tensor:
    """Logits [T, vocab]; Qwen technical report, sections 2.3 and 2.4.

    The rotary base follows from `prompt_length`, all of `input_ids` unless said otherwise: the
    published code fixes it at the prefill and keeps it while decoding.
    """
    tokens, eps, dim = len(input_ids), config["layer_norm_epsilon"], config["kv_channels"]
    rotary_dim = int(dim * config["rotary_pct"])
    alpha = ntk_alpha(config, tokens if prompt_length is None else prompt_length)
    base = config["rotary_emb_base"] * alpha ** (rotary_dim / (rotary_dim - 2))
    angle = angles(tokens, rotary_dim, base)
    scale = query_scale(config, tokens)[:, None, None]

    x = weights["transformer.wte.weight"][input_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        packed = linear(weights, f"{layer}.attn.c_attn", rms_norm(weights, f"{layer}.ln_1", x, eps))
        q, k, v = (heads(part, dim) for part in packed.chunk(3, -1))
        mixed = attend(rotate_halves(q, angle) * scale, rotate_halves(k, angle), v)
        x = x + linear(weights, f"{layer}.attn.c_proj", mixed)
        normed, mlp = rms_norm(weights, f"{layer}.ln_2", x, eps), f"{layer}.mlp"
        x = x + swiglu(weights, normed, gate=f"{mlp}.w2", up=f"{mlp}.w1", down=f"{mlp}.c_proj")
    return linear(weights, "lm_head", rms_norm(weights, "transformer.ln_f", x, eps))
