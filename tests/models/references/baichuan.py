"""Baichuan 1 and 2 (Baichuan Inc. 2023): llama with q, k and v packed in `W_pack`.

The 7B are rotary; the 13B have ALiBi instead. Nothing in the config says so but
`max_position_embeddings`, which only the rotary ones have (both may have `model_max_length`).
Baichuan 2 normalises the rows of `lm_head`; its configs differ from Baichuan 1's by a vocabulary of
125696 tokens and, at 7B, by `z_loss_weight`. Config keys are those of Baichuan-7B (class
BaiChuanForCausalLM), Baichuan-13B-Base, Baichuan2-7B-Base and Baichuan2-13B-Base (class
BaichuanForCausalLM).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tests.models.references.drawing import Draw, Weights, gated_layer, inverse_frequencies
from tests.models.references.operations import (
    alibi,
    angles,
    attend,
    heads,
    linear,
    prenorm_decoder,
    rms_norm,
    rotate_halves,
)

BAICHUAN2_VOCAB = 125696

COMMON: dict[str, Any] = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 96,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "model_type": "baichuan",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "baichuan-7b": {
        **COMMON,
        "architectures": ["BaiChuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaiChuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaiChuanForCausalLM",
        },
        "hidden_size": 64,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "torch_dtype": "float16",
    },
    "baichuan-13b": {
        **COMMON,
        "_from_model_config": True,
        "gradient_checkpointing": [False],
        "model_max_length": 512,
    },
    "baichuan-13b with 4 heads": {**COMMON, "num_attention_heads": 4, "model_max_length": 512},
    "baichuan-13b with 12 heads": {
        **COMMON,
        "hidden_size": 192,
        "num_attention_heads": 12,
        "model_max_length": 512,
    },
    "baichuan2-7b": {
        **COMMON,
        "_from_model_config": True,
        "max_position_embeddings": 512,
        "model_max_length": 512,
        "z_loss_weight": 0,
    },
    "baichuan2-13b": {
        **COMMON,
        "_from_model_config": True,
        "hidden_size": 48,
        "model_max_length": 512,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "vocab_size": BAICHUAN2_VOCAB,
    },
}


def is_rotary(config: dict[str, Any]) -> bool:
    return "max_position_embeddings" in config


def has_normalised_head(config: dict[str, Any]) -> bool:
    return config["vocab_size"] == BAICHUAN2_VOCAB or "z_loss_weight" in config


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published; `inv_freq` in Baichuan-7B, the only one of that age."""
    draw, hidden = Draw(seed), config["hidden_size"]
    tensors: Weights = {"model.embed_tokens.weight": draw.table(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.self_attn.W_pack.weight"] = draw.matrix(3 * hidden, hidden)
        tensors[f"{layer}.self_attn.o_proj.weight"] = draw.matrix(hidden, hidden)
        gated_layer(draw, tensors, layer, hidden, config["intermediate_size"])
        if config["architectures"] == ["BaiChuanForCausalLM"]:
            frequencies = inverse_frequencies(hidden // config["num_attention_heads"])
            tensors[f"{layer}.self_attn.rotary_emb.inv_freq"] = frequencies
    tensors["model.norm.weight"] = draw.scale(hidden)
    head = draw.matrix(config["vocab_size"], hidden)
    if has_normalised_head(config):  # rows of very unequal length, which must not matter
        head = head * draw.normal(config["vocab_size"], 1).exp()
    tensors["lm_head.weight"] = head
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; Baichuan 2 report (Yang et al. 2023), sections 2.3 to 2.5."""
    tokens, count = len(input_ids), config["num_attention_heads"]
    dim = config["hidden_size"] // count

    def attention(name: str, x: Tensor) -> Tensor:
        q, k, v = (heads(part, dim) for part in linear(weights, f"{name}.W_pack", x).chunk(3, -1))
        if is_rotary(config):
            angle = angles(tokens, dim, 10000.0)
            mixed = attend(rotate_halves(q, angle), rotate_halves(k, angle), v)
        else:
            mixed = attend(q, k, v, bias=alibi(count, tokens))
        return linear(weights, f"{name}.o_proj", mixed)

    x = prenorm_decoder(
        weights,
        input_ids,
        config["num_hidden_layers"],
        norm=partial(rms_norm, weights, eps=config["rms_norm_eps"]),
        attention=attention,
    )
    head = weights["lm_head.weight"]
    if has_normalised_head(config):
        head = head / head.norm(dim=-1, keepdim=True)
    return x @ head.T
