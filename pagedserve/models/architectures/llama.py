"""Llama, and the pieces that other families say their differences with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pagedserve.errors import StartupError
from pagedserve.models.architectures.registry import arch
from pagedserve.spec import Attn, DecoderSpec, Layer, Mlp, Norm, Rope

Config = dict[str, Any]

NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{i}.",
    "pre_attn": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "pre_ffn": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
QKV, OUT, MLP = frozenset({"q", "k", "v"}), frozenset({"out"}), frozenset({"gate", "up", "down"})

ACTS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@arch("LlamaForCausalLM")
def llama(c: Config) -> DecoderSpec:
    biases: frozenset[str] = frozenset()
    if c.get("attention_bias"):
        biases |= QKV | OUT
    if c.get("mlp_bias"):
        biases |= MLP
    return decoder(c, biases=biases)


def decoder(
    c: Config, *, layer: Callable[[int], Layer] | None = None, **changes: Any
) -> DecoderSpec:
    """Llama with what differs: `layer(i)` for its layers, `changes` for the spec's other fields."""
    build = layer or (lambda i: Layer(attn(c), mlp(c)))
    fields: dict[str, Any] = {
        "hidden_size": c["hidden_size"],
        "vocab_size": c["vocab_size"],
        "max_positions": c["max_position_embeddings"],
        "layers": tuple(build(i) for i in range(c["num_hidden_layers"])),
        "norm": rms(c),
        "names": NAMES,
        "prefix": "model.",
        "buffers": (r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$",),
        "tied_head": c.get("tie_word_embeddings", False),
    }
    return DecoderSpec(**{**fields, **changes})


def attn(c: Config, **changes: Any) -> Attn:
    """Llama's attention with what differs."""
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    fields: dict[str, Any] = {
        "heads": heads,
        "kv_heads": c.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "rope": rope(c, head_dim),
    }
    return Attn(**{**fields, **changes})


def rope(c: Config, head_dim: int) -> Rope:
    """From `rope_parameters`, which `config_json.read` has filled in whatever the file's age."""
    parameters = c["rope_parameters"]
    return Rope(
        theta=parameters["rope_theta"],
        dim=int(head_dim * parameters.get("partial_rotary_factor", 1.0)),
        scaling=parameters if parameters["rope_type"] != "default" else {},
    )


def mlp(c: Config) -> Mlp:
    """Llama's feed-forward."""
    return Mlp(c["intermediate_size"], activation(c["hidden_act"]))


def activation(name: str) -> Literal["silu", "gelu_tanh"]:
    """Our word for a checkpoint's. Raises StartupError for one that is not known."""
    if name not in ACTS:
        raise StartupError(f"activation {name!r} is not supported; supported: {', '.join(ACTS)}")
    return ACTS[name]


def rms(c: Config) -> Norm:
    """Llama's norm."""
    return Norm(eps=c["rms_norm_eps"])
