"""Falcon under its first names: RWForCausalLM (TII 2023), three layouts of one family.

- falcon-7b (`multi_query`): attention and MLP side by side after one norm; one key and one value.
- falcon-40b (`n_head_kv`, no `multi_query`): side by side after a norm each; groups of query heads
  followed by their key and their value.
- falcon-rw (`alibi`, `bias`, not `parallel_attn`): one after the other; each head's q, k and v
  together; ALiBi inside the division by the root of the head's width, so its slopes shrink too.

The head is the embedding; checkpoints of falcon-7b hold it twice. The published code rounds slopes
to bfloat16, which changes nothing where the number of heads makes them powers of two, as here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tests.models.references.drawing import Draw, Weights
from tests.models.references.operations import (
    alibi,
    angles,
    attend,
    layer_norm,
    linear,
    rotate_halves,
)

COMMON: dict[str, Any] = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["RWForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_RW.RWConfig",
        "AutoModelForCausalLM": "modelling_RW.RWForCausalLM",
    },
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "hidden_size": 64,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "n_head": 4,
    "n_layer": 3,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.27.4",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "RW falcon-7b": {
        **COMMON,
        "model_type": "RefinedWebModel",
        "multi_query": True,
        "parallel_attn": True,
    },
    "RW falcon-40b": {
        **COMMON,
        "model_type": "RefinedWeb",
        "n_head_kv": 2,
        "parallel_attn": True,
    },
    "RW falcon-rw": {
        **COMMON,
        "alibi": True,
        "bias": True,
        "model_type": "RefinedWebModel",
        "multi_query": False,
        "parallel_attn": False,
    },
}


def groups(config: dict[str, Any]) -> tuple[int, int]:
    """(groups, query heads a group) of `query_key_value`."""
    count = config["n_head"]
    if "n_head_kv" in config:
        return config["n_head_kv"], count // config["n_head_kv"]
    return (1, count) if config["multi_query"] else (count, 1)


def norms(config: dict[str, Any]) -> tuple[str, ...]:
    """What the norms of a layer are called: before attention, before the MLP."""
    if "n_head_kv" in config:
        return "ln_attn", "ln_mlp"
    if config["parallel_attn"]:
        return ("input_layernorm",)
    return "input_layernorm", "post_attention_layernorm"


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden = Draw(seed), config["hidden_size"]
    number, shared = groups(config)
    packed = number * (shared + 2) * (hidden // config["n_head"])
    table = draw.matrix(config["vocab_size"], hidden)
    tensors: Weights = {"transformer.word_embeddings.weight": table}
    shapes = {
        "self_attention.query_key_value": (packed, hidden),
        "self_attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (4 * hidden, hidden),
        "mlp.dense_4h_to_h": (hidden, 4 * hidden),
    }
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        for name in norms(config):
            tensors[f"{layer}.{name}.weight"] = draw.scale(hidden)
            tensors[f"{layer}.{name}.bias"] = draw.bias(hidden)
        for name, shape in shapes.items():
            tensors[f"{layer}.{name}.weight"] = draw.matrix(*shape)
            if config["bias"]:
                tensors[f"{layer}.{name}.bias"] = draw.bias(shape[0])
    tensors["transformer.ln_f.weight"] = draw.scale(hidden)
    tensors["transformer.ln_f.bias"] = draw.bias(hidden)
    if config.get("multi_query"):
        tensors["lm_head.weight"] = table.clone()
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; Falcon (Almazrouei et al. 2023), section 4, and the published configs."""
    tokens, count = len(input_ids), config["n_head"]
    dim = config["hidden_size"] // count
    number, shared = groups(config)
    norm = partial(layer_norm, weights, eps=config["layer_norm_epsilon"])
    angle = angles(tokens, dim, 10000.0)

    def attention(name: str, x: Tensor) -> Tensor:
        packed = linear(weights, f"{name}.query_key_value", x)
        packed = packed.unflatten(-1, (number, shared + 2, dim))
        q, k, v = (
            packed[:, :, :shared].flatten(1, 2),
            packed[:, :, shared],
            packed[:, :, shared + 1],
        )
        if config["alibi"]:
            mixed = attend(q, k, v, bias=alibi(count, tokens) * dim**-0.5)
        else:
            mixed = attend(rotate_halves(q, angle), rotate_halves(k, angle), v)
        return linear(weights, f"{name}.dense", mixed)

    def mlp(name: str, x: Tensor) -> Tensor:
        return linear(
            weights, f"{name}.dense_4h_to_h", F.gelu(linear(weights, f"{name}.dense_h_to_4h", x))
        )

    x = weights["transformer.word_embeddings.weight"][input_ids]
    for i in range(config["n_layer"]):
        layer, names = f"transformer.h.{i}", norms(config)
        mixed = attention(f"{layer}.self_attention", norm(f"{layer}.{names[0]}", x))
        if config["parallel_attn"]:
            x = x + mixed + mlp(f"{layer}.mlp", norm(f"{layer}.{names[-1]}", x))
        else:
            x = x + mixed
            x = x + mlp(f"{layer}.mlp", norm(f"{layer}.{names[-1]}", x))
    return linear(weights, "transformer.word_embeddings", norm("transformer.ln_f", x))
