"""InternLM 1 (Shanghai AI Laboratory 2023): llama whose q, k, v and o have biases.

Config keys are those of internlm/internlm-7b (`bias` true, no rope keys, `rotary_emb.inv_freq` in
the checkpoint) and of internlm/internlm-20b (`bias` false, the keys of later llamas).
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
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm.InternLMConfig",
        "AutoModel": "modeling_internlm.InternLMForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM",
    },
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "max_position_embeddings": 512,
    "model_type": "internlm",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "internlm-7b": CONFIG,
    "internlm-20b": {
        **CONFIG,
        "bias": False,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
    },
}


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published; `inv_freq` only beside biases (the 7B)."""
    draw, hidden = Draw(seed), config["hidden_size"]
    dim = hidden // config["num_attention_heads"]
    tensors: Weights = {"model.embed_tokens.weight": draw.table(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        projections(draw, tensors, layer, hidden, q=hidden, kv=hidden, bias=config["bias"])
        gated_layer(draw, tensors, layer, hidden, config["intermediate_size"])
        if config["bias"]:
            tensors[f"{layer}.self_attn.rotary_emb.inv_freq"] = inverse_frequencies(dim)
    tensors["model.norm.weight"] = draw.scale(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; llama with biases, from the published layout of internlm-7b."""
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
