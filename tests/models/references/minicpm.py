"""MiniCPM (Hu et al. 2024): llama with three factors of muP, dense or with a mixture of experts.

Embeddings are multiplied by `scale_emb`, what attention and MLP add by `scale_depth` over the root
of the number of layers, and the last hidden states divided by hidden size over `dim_model_base`.
The head is the embedding unless `tie_word_embeddings` says otherwise: the configs do not say and
the class ties. Config keys are those of openbmb/MiniCPM-2B-sft-bf16, MiniCPM-1B-sft-bf16 and
MiniCPM-MoE-8x2B.
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
    "_name_or_path": "openbmb/CPM-2B",
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModel": "modeling_minicpm.MiniCPMModel",
        "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
        "AutoModelForSeq2SeqLM": "modeling_minicpm.MiniCPMForCausalLM",
        "AutoModelForSequenceClassification": "modeling_minicpm.MiniCPMForSequenceClassification",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 96,
    "initializer_range": 0.1,
    "intermediate_size": 88,
    "max_position_embeddings": 512,
    "model_type": "minicpm",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 6,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 256,
    "scale_emb": 12,
    "dim_model_base": 32,
    "scale_depth": 1.4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "minicpm-2b": CONFIG,
    "minicpm-1b": {
        **CONFIG,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "minicpm-moe": {**CONFIG, "num_experts": 5, "num_experts_per_tok": 2},
}


def is_tied(config: dict[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", True))


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden, ffn = Draw(seed), config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors: Weights = {
        "model.embed_tokens.weight": 0.02 * draw.table(config["vocab_size"], hidden)
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        projections(draw, tensors, layer, hidden, q=hidden, kv=kv)
        tensors[f"{layer}.input_layernorm.weight"] = draw.scale(hidden)
        tensors[f"{layer}.post_attention_layernorm.weight"] = draw.scale(hidden)
        shapes = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
        if "num_experts" in config:
            tensors[f"{layer}.mlp.gate.weight"] = draw.matrix(config["num_experts"], hidden)
            shapes = {
                f"experts.{e}.{name}": shape
                for e in range(config["num_experts"])
                for name, shape in (
                    ("w1", (ffn, hidden)),
                    ("w2", (hidden, ffn)),
                    ("w3", (ffn, hidden)),
                )
            }
        for name, shape in shapes.items():
            tensors[f"{layer}.mlp.{name}.weight"] = draw.matrix(*shape)
    tensors["model.norm.weight"] = draw.scale(hidden)
    if not is_tied(config):
        tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def mlp(config: dict[str, Any], weights: Weights, name: str, x: Tensor) -> Tensor:
    """Gated, or Mixtral's mixture: softmax over the chosen experts."""
    if "num_experts" not in config:
        parts = {part: f"{name}.{part}_proj" for part in ("gate", "up", "down")}
        return swiglu(weights, x, **parts)

    def expert(number: int, token: Tensor) -> Tensor:
        w = f"{name}.experts.{number}.w"
        return swiglu(weights, token, gate=f"{w}1", up=f"{w}3", down=f"{w}2")

    chances = linear(weights, f"{name}.gate", x).softmax(-1)
    return mixture(x, chances, config["num_experts_per_tok"], expert, renormalise=True)


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; MiniCPM, appendix A.1 (the factors of muP), and the published configs."""
    dim = config["hidden_size"] // config["num_attention_heads"]
    angle = angles(len(input_ids), dim, config.get("rope_theta", 10000.0))
    norm = partial(rms_norm, weights, eps=config["rms_norm_eps"])
    depth = config["scale_depth"] / config["num_hidden_layers"] ** 0.5

    x = weights["model.embed_tokens.weight"][input_ids] * config["scale_emb"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        normed = norm(f"{layer}.input_layernorm", x)
        x = x + depth * rotary_attention(weights, dim, angle, f"{layer}.self_attn", normed)
        normed = norm(f"{layer}.post_attention_layernorm", x)
        x = x + depth * mlp(config, weights, f"{layer}.mlp", normed)
    x = norm("model.norm", x) / (config["hidden_size"] / config["dim_model_base"])
    return linear(weights, "model.embed_tokens" if is_tied(config) else "lm_head", x)
