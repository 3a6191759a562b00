"""DeciLM, second form: Nemotron-NAS (Bercovich et al. 2024, "Puzzle"), a llama 3 cut by search.

`block_configs` gives each layer its attention (`n_heads_in_group` query heads a key-value head, a
single matrix, or nothing) and its MLP (`ffn_mult`, a single matrix, or nothing). What is nothing
has no norm either. Config keys are those of nvidia/Llama-3_1-Nemotron-51B-Instruct and
Llama-3_3-Nemotron-Super-49B-v1. The width of an MLP is 2/3 of `ffn_mult` times the hidden size,
rounded up to a multiple of 256.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.models.references.drawing import Draw, Weights, projections
from tests.models.references.operations import (
    linear,
    llama3_frequencies,
    positions_times,
    rms_norm,
    rotary_attention,
    swiglu,
)


def block(attention: int | str, ffn: float | str) -> dict[str, Any]:
    """One entry of `block_configs`; a number, or "no_op", or "replace_with_linear"."""
    return {
        "attention": {
            "n_heads_in_group": attention if isinstance(attention, int) else None,
            "no_op": attention == "no_op",
            "num_sink_tokens": None,
            "replace_with_linear": attention == "replace_with_linear",
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {
            "ffn_mult": ffn if isinstance(ffn, float) else None,
            "no_op": ffn == "no_op",
            "replace_with_linear": ffn == "replace_with_linear",
            "sparsify": None,
        },
    }


CONFIG: dict[str, Any] = {
    "_name_or_path": "llama_nemotron_super",
    "architectures": ["DeciLMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_decilm.DeciLMConfig",
        "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
    },
    "block_configs": [
        block(2, 2.625),
        block("no_op", 1.3125),
        block("replace_with_linear", 5.25),
        block(4, "no_op"),
        block(1, "replace_with_linear"),
        block("no_op", "no_op"),
        block(4, 0.5),
    ],
    "bos_token_id": 1,
    "eos_token_id": [2, 3, 4],
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "nemotron-nas",
    "num_attention_heads": 4,
    "num_hidden_layers": 7,
    "num_key_value_heads": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "nemotron-nas": CONFIG,
    "nemotron-nas with equal layers": {
        **CONFIG,
        "block_configs": [block(2, 2.625)] * 3,
        "num_hidden_layers": 3,
    },
}


def width(config: dict[str, Any], ffn: dict[str, Any]) -> int:
    """`ffn_mult` 5.25 of 64: int(224.0) = 224, rounded up to 256."""
    return -(-int(2 * ffn["ffn_mult"] * config["hidden_size"] / 3) // 256) * 256


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published: a layer has tensors only for the parts that it has."""
    draw, hidden = Draw(seed), config["hidden_size"]
    dim = hidden // config["num_attention_heads"]
    tensors: Weights = {"model.embed_tokens.weight": draw.table(config["vocab_size"], hidden)}
    for i, parts in enumerate(config["block_configs"]):
        layer, attention, ffn = f"model.layers.{i}", parts["attention"], parts["ffn"]
        if not attention["no_op"]:
            tensors[f"{layer}.input_layernorm.weight"] = draw.scale(hidden)
        if attention["replace_with_linear"]:
            name = f"{layer}.self_attn.linear_attn.weight"
            tensors[name] = draw.matrix(hidden, hidden)
        elif not attention["no_op"]:
            kv = config["num_attention_heads"] // attention["n_heads_in_group"] * dim
            projections(draw, tensors, layer, hidden, q=hidden, kv=kv)
        if not ffn["no_op"]:
            tensors[f"{layer}.post_attention_layernorm.weight"] = draw.scale(hidden)
        if ffn["replace_with_linear"]:
            tensors[f"{layer}.mlp.linear_mlp.weight"] = draw.matrix(hidden, hidden)
        elif not ffn["no_op"]:
            wide = width(config, ffn)
            tensors[f"{layer}.mlp.gate_proj.weight"] = draw.matrix(wide, hidden)
            tensors[f"{layer}.mlp.up_proj.weight"] = draw.matrix(wide, hidden)
            tensors[f"{layer}.mlp.down_proj.weight"] = draw.matrix(hidden, wide)
    tensors["model.norm.weight"] = draw.scale(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; Puzzle, section 2 (the search space), with llama 3.1's rotary scaling."""
    eps, dim = config["rms_norm_eps"], config["hidden_size"] // config["num_attention_heads"]
    frequencies = llama3_frequencies(dim, config["rope_theta"], config["rope_scaling"])
    angle = positions_times(len(input_ids), frequencies)

    def attention(name: str, kind: dict[str, Any], x: Tensor) -> Tensor:
        if kind["replace_with_linear"]:
            return linear(weights, f"{name}.linear_attn", x)
        return rotary_attention(weights, dim, angle, name, x)

    def mlp(name: str, kind: dict[str, Any], x: Tensor) -> Tensor:
        if kind["replace_with_linear"]:
            return linear(weights, f"{name}.linear_mlp", x)
        names = {part: f"{name}.{part}_proj" for part in ("gate", "up", "down")}
        return swiglu(weights, x, **names)

    x = weights["model.embed_tokens.weight"][input_ids]
    for i, parts in enumerate(config["block_configs"]):
        layer = f"model.layers.{i}"
        if not parts["attention"]["no_op"]:
            normed = rms_norm(weights, f"{layer}.input_layernorm", x, eps)
            x = x + attention(f"{layer}.self_attn", parts["attention"], normed)
        if not parts["ffn"]["no_op"]:
            normed = rms_norm(weights, f"{layer}.post_attention_layernorm", x, eps)
            x = x + mlp(f"{layer}.mlp", parts["ffn"], normed)
    return linear(weights, "lm_head", rms_norm(weights, "model.norm", x, eps))
