"""Solar Pro (Upstage 2024): llama with skips over blocks of layers.

Before a layer of `bskcn_1` (or `bskcn_2`) the hidden states are kept; before one of `bskcn_3` (or
`bskcn_4`) they are blended with what was kept last: t of the kept and 1 - t of the current, where t
is the second entry of `bskcn_tv` (the first is for training). A layer that both blends and keeps
keeps first. Config keys are those of upstage/solar-pro-preview-instruct; its `sliding_window` is
larger than what is tested here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tests.models.references.drawing import Draw, Weights, gated_layer, projections
from tests.models.references.operations import (
    angles,
    linear,
    rms_norm,
    rotary_attention,
    swiglu,
)

CONFIG: dict[str, Any] = {
    "architectures": ["SolarForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_solar.SolarConfig",
        "AutoModelForCausalLM": "modeling_solar.SolarForCausalLM",
    },
    "bos_token_id": 1,
    "bskcn_1": [1, 3],
    "bskcn_2": [2],
    "bskcn_3": [2, 5],
    "bskcn_4": [4],
    "bskcn_tv": [0.9, 0.8],
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "solar",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.2",
    "use_cache": True,
    "vocab_size": 256,
}
CONFIGS: dict[str, dict[str, Any]] = {"solar": CONFIG}


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published: llama's."""
    draw, hidden = Draw(seed), config["hidden_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors: Weights = {"model.embed_tokens.weight": draw.table(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        projections(draw, tensors, layer, hidden, q=hidden, kv=kv)
        gated_layer(draw, tensors, layer, hidden, config["intermediate_size"])
    tensors["model.norm.weight"] = draw.scale(hidden)
    tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab], from the published config and its keys."""
    dim = config["hidden_size"] // config["num_attention_heads"]
    angle = angles(len(input_ids), dim, config["rope_theta"])
    norm = partial(rms_norm, weights, eps=config["rms_norm_eps"])
    kept: dict[str, Tensor] = {}
    share = config["bskcn_tv"][1]

    x = weights["model.embed_tokens.weight"][input_ids]
    for i in range(config["num_hidden_layers"]):
        for keep in ("bskcn_1", "bskcn_2"):
            if i in config[keep]:
                kept[keep] = x
        for blend, keep in (("bskcn_3", "bskcn_1"), ("bskcn_4", "bskcn_2")):
            if i in config[blend]:
                x = share * kept[keep] + (1 - share) * x
        layer = f"model.layers.{i}"
        normed = norm(f"{layer}.input_layernorm", x)
        x = x + rotary_attention(weights, dim, angle, f"{layer}.self_attn", normed)
        parts = {part: f"{layer}.mlp.{part}_proj" for part in ("gate", "up", "down")}
        x = x + swiglu(weights, norm(f"{layer}.post_attention_layernorm", x), **parts)
    return linear(weights, "lm_head", norm("model.norm", x))
