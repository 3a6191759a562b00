"""Jais (Sengupta et al. 2023): GPT-2's layers with ALiBi, SwiGLU and the factors of muP.

Matrices of layers lie [in, out], as GPT-2's. The MLP is c_proj(c_fc(x) * silu(c_fc2(x))). Scores
are divided by the head's width, not by its root, where `scale_qk_dot_by_d` says so; embeddings are
multiplied by `embeddings_scale` and logits by `width_scale`. The head is the embedding. Config keys
are those of core42/jais-13b, and of the later uploads, which name the factors `mup_…`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.references.drawing import Draw, Weights
from tests.models.references.operations import alibi, alibi_slopes, attend, heads, layer_norm

COMMON: dict[str, Any] = {
    "activation_function": "swiglu",
    "architectures": ["JAISLMHeadModel"],
    "attn_pdrop": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_jais.JAISConfig",
        "AutoModel": "modeling_jais.JAISModel",
        "AutoModelForCausalLM": "modeling_jais.JAISLMHeadModel",
    },
    "bos_token_id": 0,
    "embd_pdrop": 0.0,
    "eos_token_id": 0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "jais",
    "n_embd": 96,
    "n_head": 6,
    "n_inner": 88,
    "n_layer": 3,
    "n_positions": 512,
    "pad_token_id": 0,
    "position_embedding_type": "alibi",
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.0,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "torch_dtype": "float32",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "jais-13b": {
        **COMMON,
        "embeddings_scale": 14.6,
        "scale_qk_dot_by_d": True,
        "width_scale": 0.111,
    },
    "jais-family": {
        **COMMON,
        "mup_embeddings_scale": 9.17,
        "mup_output_alpha": 1.1,
        "mup_scale_qk_dot_by_d": True,
        "mup_width_scale": 0.125,
    },
    "jais without muP": {**COMMON, "n_head": 4},
}


def factors(config: dict[str, Any]) -> tuple[float, float, bool]:
    """Of embeddings, of logits, and whether scores are divided by the whole width."""
    logits = config.get("mup_output_alpha", 1.0) * config.get("mup_width_scale", 1.0)
    return (
        config.get("embeddings_scale", config.get("mup_embeddings_scale", 1.0)),
        config.get("width_scale", logits),
        config.get("scale_qk_dot_by_d", config.get("mup_scale_qk_dot_by_d", False)),
    )


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published, with the buffer of slopes [heads, 1]."""
    draw, hidden, ffn = Draw(seed), config["n_embd"], config["n_inner"]
    table = 0.3 * draw.table(config["vocab_size"], hidden) / factors(config)[0]
    slopes = torch.tensor(alibi_slopes(config["n_head"]))[:, None]
    tensors: Weights = {"transformer.wte.weight": table, "transformer.relative_pe.slopes": slopes}
    shapes = {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, ffn),
        "mlp.c_fc2": (hidden, ffn),
        "mlp.c_proj": (ffn, hidden),
    }
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        for name, (rows, columns) in shapes.items():
            tensors[f"{layer}.{name}.weight"] = draw.matrix(columns, rows).T.contiguous()
            tensors[f"{layer}.{name}.bias"] = draw.bias(columns)
        for name in ("ln_1", "ln_2"):
            tensors[f"{layer}.{name}.weight"] = draw.scale(hidden)
            tensors[f"{layer}.{name}.bias"] = draw.bias(hidden)
    tensors["transformer.ln_f.weight"] = draw.scale(hidden)
    tensors["transformer.ln_f.bias"] = draw.bias(hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; Jais report, section 3, and the published configs."""
    tokens, count = len(input_ids), config["n_head"]
    dim = config["n_embd"] // count
    embedding_factor, logits_factor, by_width = factors(config)
    norm = partial(layer_norm, weights, eps=config["layer_norm_epsilon"])
    bias = alibi(count, tokens)

    def conv1d(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["transformer.wte.weight"][input_ids] * embedding_factor
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        packed = conv1d(f"{layer}.attn.c_attn", norm(f"{layer}.ln_1", x))
        q, k, v = (heads(part, dim) for part in packed.chunk(3, dim=-1))
        mixed = attend(q, k, v, bias=bias, scale=dim ** (-1.0 if by_width else -0.5))
        x = x + conv1d(f"{layer}.attn.c_proj", mixed)
        normed, mlp = norm(f"{layer}.ln_2", x), f"{layer}.mlp"
        gated = conv1d(f"{mlp}.c_fc", normed) * F.silu(conv1d(f"{mlp}.c_fc2", normed))
        x = x + conv1d(f"{mlp}.c_proj", gated)
    return norm("transformer.ln_f", x) @ weights["transformer.wte.weight"].T * logits_factor
