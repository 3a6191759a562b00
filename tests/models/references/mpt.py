"""MPT under its first name: MPTForCausalLM (MosaicML 2023), in the keys of its own config.

LayerNorm without bias, ALiBi, GELU, no bias anywhere, q, k and v packed one after the other, where
`clip_qkv` bounds them; the head is the embedding. Config keys are those of mosaicml/mpt-7b and
mpt-7b-storywriter (`clip_qkv`). The further options act as in llm-foundry, which trained them:
`qk_ln` normalises all of q and all of k behind the bound, `kv_n_heads` groups heads, without
`alibi` positions are learned, and without `no_bias` every matrix and norm has one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.references.drawing import Draw, Weights
from tests.models.references.operations import alibi_slopes, attend, heads, layer_norm, linear

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
    "mpt with normed and grouped heads": {
        **CONFIG,
        "attn_config": {
            **CONFIG["attn_config"],
            "alibi_bias_max": 4,
            "attn_type": "grouped_query_attention",
            "kv_n_heads": 2,
            "qk_ln": True,
            "softmax_scale": 0.2,
        },
        "logit_scale": 0.5,
    },
    "mpt with learned positions and biases": {
        **CONFIG,
        "attn_config": {**CONFIG["attn_config"], "alibi": False},
        "expansion_ratio": 2,
        "no_bias": False,
    },
}


def kv_heads(config: dict[str, Any]) -> int:
    return int(config["attn_config"].get("kv_n_heads", config["n_heads"]))


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published."""
    draw, hidden, options = Draw(seed), config["d_model"], config["attn_config"]
    wide, kv = config["expansion_ratio"] * hidden, hidden // config["n_heads"] * kv_heads(config)
    tensors: Weights = {"transformer.wte.weight": draw.matrix(config["vocab_size"], hidden)}
    if not options["alibi"]:
        table = draw.matrix(config["max_seq_len"], hidden)
        tensors["transformer.wpe.weight"] = table

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = draw.scale(width)
        if not config["no_bias"]:
            tensors[f"{name}.bias"] = draw.bias(width)

    def projection(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = draw.matrix(rows, columns)
        if not config["no_bias"]:
            tensors[f"{name}.bias"] = draw.bias(rows)

    for i in range(config["n_layers"]):
        block = f"transformer.blocks.{i}"
        norm(f"{block}.norm_1", hidden)
        projection(f"{block}.attn.Wqkv", hidden + 2 * kv, hidden)
        if options["qk_ln"]:
            norm(f"{block}.attn.q_ln", hidden)
            norm(f"{block}.attn.k_ln", kv)
        projection(f"{block}.attn.out_proj", hidden, hidden)
        norm(f"{block}.norm_2", hidden)
        projection(f"{block}.ffn.up_proj", wide, hidden)
        projection(f"{block}.ffn.down_proj", hidden, wide)
    norm("transformer.norm_f", hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; the model card of mosaicml/mpt-7b, and the published config."""
    tokens, count, options = len(input_ids), config["n_heads"], config["attn_config"]
    dim = config["d_model"] // count
    norm = partial(layer_norm, weights, eps=1e-5)
    # A span of 8 is the paper's; another one is a power of its slopes.
    bias = -(alibi_sizes(count) ** (options["alibi_bias_max"] / 8))[:, None, None] * far(tokens)

    def attention(name: str, x: Tensor) -> Tensor:
        packed = linear(weights, f"{name}.Wqkv", x)
        if options["clip_qkv"] is not None:
            packed = packed.clamp(-options["clip_qkv"], options["clip_qkv"])
        kv = kv_heads(config) * dim
        q, k, v = packed.split([count * dim, kv, kv], dim=-1)
        if options["qk_ln"]:
            q, k = norm(f"{name}.q_ln", q), norm(f"{name}.k_ln", k)
        mixed = attend(
            heads(q, dim),
            heads(k, dim),
            heads(v, dim),
            bias=bias if options["alibi"] else None,
            scale=options["softmax_scale"],
        )
        return linear(weights, f"{name}.out_proj", mixed)

    x = weights["transformer.wte.weight"][input_ids]
    if not options["alibi"]:
        x = x + weights["transformer.wpe.weight"][:tokens]
    for i in range(config["n_layers"]):
        block = f"transformer.blocks.{i}"
        x = x + attention(f"{block}.attn", norm(f"{block}.norm_1", x))
        wide = F.gelu(linear(weights, f"{block}.ffn.up_proj", norm(f"{block}.norm_2", x)))
        x = x + linear(weights, f"{block}.ffn.down_proj", wide)
    logits = linear(weights, "transformer.wte", norm("transformer.norm_f", x))
    return logits * (config["logit_scale"] or 1)


def alibi_sizes(count: int) -> Tensor:
    return torch.tensor(alibi_slopes(count))


def far(tokens: int) -> Tensor:
    """How far a query is from a key before it, [T, T]."""
    position = torch.arange(tokens).float()
    return position[:, None] - position[None, :]
