"""MPT under its first name: MPTForCausalLM (MosaicML 2023), in the keys of its own config.

LayerNorm without bias, ALiBi, GELU, no bias anywhere, q, k and v packed one after the other, where
`clip_qkv` bounds them; the head is the embedding. Config keys are those of mosaicml/mpt-7b and
mpt-7b-storywriter (`clip_qkv`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tests.models.references.drawing import Draw, Weights
from tests.models.references.operations import alibi, attend, heads, layer_norm, linear

CONFIG: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "d_model": 96,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 512,
    "model_type": "mpt",
    "n_heads": 6,
    "n_layers": 3,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mpt-7b": CONFIG,
    "mpt-7b-storywriter": {**CONFIG, "attn_config": {**CONFIG["attn_config"], "clip_qkv": 0.8}},
}


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden = Draw(seed), config["d_model"]
    wide = config["expansion_ratio"] * hidden
    tensors: Weights = {"transformer.wte.weight": draw.matrix(config["vocab_size"], hidden)}
    for i in range(config["n_layers"]):
        block = f"transformer.blocks.{i}"
        tensors[f"{block}.norm_1.weight"] = draw.scale(hidden)
        tensors[f"{block}.attn.Wqkv.weight"] = draw.matrix(3 * hidden, hidden)
        tensors[f"{block}.attn.out_proj.weight"] = draw.matrix(hidden, hidden)
        tensors[f"{block}.norm_2.weight"] = draw.scale(hidden)
        tensors[f"{block}.ffn.up_proj.weight"] = draw.matrix(wide, hidden)
        tensors[f"{block}.ffn.down_proj.weight"] = draw.matrix(hidden, wide)
    tensors["transformer.norm_f.weight"] = draw.scale(hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; the model card of mosaicml/mpt-7b, and the published config."""
    tokens, count = len(input_ids), config["n_heads"]
    bound = config["attn_config"]["clip_qkv"]
    norm = partial(layer_norm, weights, eps=1e-5)

    x = weights["transformer.wte.weight"][input_ids]
    for i in range(config["n_layers"]):
        block = f"transformer.blocks.{i}"
        packed = linear(weights, f"{block}.attn.Wqkv", norm(f"{block}.norm_1", x))
        if bound is not None:
            packed = packed.clamp(-bound, bound)
        q, k, v = (heads(part, config["d_model"] // count) for part in packed.chunk(3, dim=-1))
        mixed = attend(q, k, v, bias=alibi(count, tokens))
        x = x + linear(weights, f"{block}.attn.out_proj", mixed)
        wide = F.gelu(linear(weights, f"{block}.ffn.up_proj", norm(f"{block}.norm_2", x)))
        x = x + linear(weights, f"{block}.ffn.down_proj", wide)
    return linear(weights, "transformer.wte", norm("transformer.norm_f", x))
