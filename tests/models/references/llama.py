"""Families that are llama (Touvron et al. 2023) under other class names, with or without biases.

Config keys are those of llama-7b-hf of the first conversion (LLaMAForCausalLM and
`max_sequence_length`), BAAI/Aquila-7B and AquilaChat2-34B (the hub's `architectures` says
AquilaModel, its auto_map AquilaForCausalLM), internlm-7b (q, k, v and o have biases) and
internlm-20b (`bias` false), internlm3-8b-instruct (wide heads, dynamic NTK) and XVERSE-13B.
Checkpoints of the first age, whose configs know no `rope_theta`, carry `rotary_emb.inv_freq`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tests.models.references.drawing import Draw, Weights, inverse_frequencies
from tests.models.references.operations import (
    angles,
    dynamic_base,
    linear,
    prenorm_decoder,
    rms_norm,
    rotary_attention,
)

COMMON: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 256,
}
AQUILA: dict[str, Any] = {
    **COMMON,
    "architectures": ["AquilaModel"],
    "auto_map": {
        "AutoConfig": "configuration_aquila.AquilaConfig",
        "AutoModelForCausalLM": "modeling_aquila.AquilaForCausalLM",
    },
    "max_position_embeddings": 512,
    "model_type": "aquila",
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "transformers_version": "4.31.0",
}
INTERNLM: dict[str, Any] = {
    **COMMON,
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm.InternLMConfig",
        "AutoModel": "modeling_internlm.InternLMForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM",
    },
    "bias": True,
    "max_position_embeddings": 512,
    "model_type": "internlm",
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "transformers_version": "4.29.2",
}
INTERNLM3: dict[str, Any] = {
    **COMMON,
    "architectures": ["InternLM3ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_internlm3.InternLM3Config",
        "AutoModel": "modeling_internlm3.InternLM3ForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM",
    },
    "bias": False,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "model_type": "internlm3",
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "qkv_bias": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
    "rope_theta": 50000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.1",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "LLaMA": {
        **COMMON,
        "architectures": ["LLaMAForCausalLM"],
        "max_sequence_length": 512,
        "model_type": "llama",
        "pad_token_id": -1,
        "transformers_version": "4.27.0.dev0",
    },
    "aquila": AQUILA,
    "aquila2-34b": {
        **AQUILA,
        "architectures": ["AquilaForCausalLM"],
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
    },
    "internlm-7b": INTERNLM,
    "internlm-20b": {
        **INTERNLM,
        "bias": False,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
    },
    "internlm3": INTERNLM3,
    "internlm3 with biases": {**INTERNLM3, "bias": True, "qkv_bias": True},
    "xverse": {
        **COMMON,
        "architectures": ["XverseForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_xverse.XverseConfig",
            "AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM",
        },
        "max_position_embeddings": 512,
        "max_tokenizer_truncation": 384,
        "model_type": "xverse",
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.30.2",
    },
}


def biased(config: dict[str, Any]) -> str:
    """The initials of the projections that have a bias: q, k, v, o, gate, up, down."""
    if config["model_type"] == "internlm3":
        return ("qkv" if config["qkv_bias"] else "") + ("ogud" if config["bias"] else "")
    return "qkvo" if config.get("bias") else ""


def head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden, ffn = Draw(seed), config["hidden_size"], config["intermediate_size"]
    dim, heads = head_dim(config), config["num_attention_heads"]
    kv = config.get("num_key_value_heads", heads) * dim
    tensors: Weights = {"model.embed_tokens.weight": draw.table(config["vocab_size"], hidden)}
    shapes = {
        "self_attn.q_proj": (heads * dim, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, shape in shapes.items():
            tensors[f"{layer}.{name}.weight"] = draw.matrix(*shape)
            if name.partition(".")[2][0] in biased(config):
                tensors[f"{layer}.{name}.bias"] = draw.bias(shape[0])
        tensors[f"{layer}.input_layernorm.weight"] = draw.scale(hidden)
        tensors[f"{layer}.post_attention_layernorm.weight"] = draw.scale(hidden)
        if "rope_theta" not in config:
            tensors[f"{layer}.self_attn.rotary_emb.inv_freq"] = inverse_frequencies(dim)
    tensors["model.norm.weight"] = draw.scale(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab].

    With dynamic NTK the base follows from the length of `input_ids`, as in one prefill of them.
    """
    dim, base = head_dim(config), config.get("rope_theta", 10000.0)
    if config.get("rope_scaling"):
        assert config["rope_scaling"]["rope_type"] == "dynamic"
        factor, trained = config["rope_scaling"]["factor"], config["max_position_embeddings"]
        base = dynamic_base(base, dim, factor=factor, tokens=len(input_ids), trained=trained)
    angle = angles(len(input_ids), dim, base)
    x = prenorm_decoder(
        weights,
        input_ids,
        config["num_hidden_layers"],
        norm=partial(rms_norm, weights, eps=config["rms_norm_eps"]),
        attention=partial(rotary_attention, weights, dim, angle),
    )
    return linear(weights, "lm_head", x)
