"""Llama, and the pieces that other families say their differences with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pagedserve.errors import StartupError
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import Act, Attn, DecoderSpec, Layer, Mlp, Norm, Rope

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
HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
QKV, OUT, MLP = frozenset({"q", "k", "v"}), frozenset({"out"}), frozenset({"gate", "up", "down"})
NORMS = frozenset({"pre_attn", "pre_ffn", "final_norm"})
KINDS = ("full_attention", "sliding_attention")

ACTS: dict[str, Act] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}


@arch("LlamaForCausalLM", "LLaMAForCausalLM", "YiForCausalLM")
def llama(c: Config) -> DecoderSpec:
    return decoder(c, biases=biases(c))


def decoder(
    c: Config, *, layer: Callable[[int], Layer] | None = None, **changes: Any
) -> DecoderSpec:
    """Llama with what differs: `layer(i)` for its layers, `changes` for the spec's other fields."""
    build = layer or (lambda i: Layer(attn(c), mlp(c)))
    positions: int = changes.get("max_positions") or c["max_position_embeddings"]
    fields: dict[str, Any] = {
        "hidden_size": c["hidden_size"],
        "vocab_size": c["vocab_size"],
        "max_positions": positions,
        "stretched_positions": stretched(c, positions),
        "norm": rms(c),
        "names": NAMES,
        "prefix": "model.",
        "ignored": (r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$",),
        "tied_head": c.get("tie_word_embeddings", False),
    }
    if "layers" not in changes:
        fields["layers"] = tuple(build(i) for i in range(c["num_hidden_layers"]))
    return DecoderSpec(**{**fields, **changes})


def attn(c: Config, **changes: Any) -> Attn:
    """Llama's attention with what differs."""
    heads = c["num_attention_heads"]
    fields: dict[str, Any] = {
        "heads": heads,
        "kv_heads": c.get("num_key_value_heads") or heads,
        "head_dim": head_dim(c),
        "scale": head_dim(c) ** -0.5,
    }
    if "rope" not in changes:
        fields["rope"] = rope(c)
    return Attn(**{**fields, **changes})


def head_dim(c: Config) -> int:
    """Its own, or the heads share the hidden size."""
    size: int = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    return size


def rope(
    c: Config,
    kind: str | None = None,
    *,
    dim: int | None = None,
    partial: float = 1.0,
    **changes: Any,
) -> Rope:
    """From `rope_parameters`, which `config_json.read` has filled in whatever the file's age.

    `kind`: of layer, where each has its own. `dim`: numbers that the rotated share is of, if not
    the head's. `partial`: that share, where the file does not say.
    """
    parameters = c["rope_parameters"]
    if kind is not None and kind in parameters:
        parameters = parameters[kind]
    if "rope_type" not in parameters:
        raise StartupError("config.json: rope_parameters must be one flat object, for all layers")
    fields: dict[str, Any] = {
        "theta": parameters["rope_theta"],
        "dim": int((dim or head_dim(c)) * parameters.get("partial_rotary_factor", partial)),
        "scaling": parameters if parameters["rope_type"] != "default" else {},
    }
    return Rope(**{**fields, **changes})


def rope_by_kind(c: Config, kind: str, *, local_theta: float | None = None) -> Rope:
    """Layers of both kinds. Older files have one object, whose scaling is of full layers only.

    `local_theta`: of those that slide there, if it differs.
    """
    if kind == KINDS[0] or kind in c["rope_parameters"]:
        return rope(c, kind)
    plain = rope(c, scaling={})
    return plain if local_theta is None else replace(plain, theta=local_theta)


def stretched(c: Config, positions: int) -> int | None:
    """How far scalings that adapt to the context reach beyond the trained positions, if asked."""
    parameters = c["rope_parameters"]
    if parameters.get("rope_type") != "dynamic":
        return None
    return int(positions * parameters["factor"])


def kinds(c: Config, full_every: int | None = None) -> list[str]:
    """Every layer's kind, one of `KINDS`.

    Where the file does not say: every `full_every`th is full, the last of so many; without it all
    slide if there is a window. Raises StartupError for a kind that is not known, and for too few.
    """
    given, count = c.get("layer_types"), c["num_hidden_layers"]
    if given is None:
        if full_every is None:
            given = [KINDS[1] if c.get("sliding_window") else KINDS[0]] * count
        else:
            given = [KINDS[(i + 1) % full_every != 0] for i in range(count)]
    if len(given) < count:
        raise StartupError(f"config.json: layer_types names {len(given)} layers of {count}")
    for kind in given:
        if kind not in KINDS:
            raise StartupError(
                f"config.json: layer_types has {kind!r}; supported: {', '.join(KINDS)}"
            )
    return list(given)


def windows(c: Config, full_every: int | None = None) -> list[int | None]:
    """Every layer's window, by its kind; None for one that sees everything."""
    return [c["sliding_window"] if k == KINDS[1] else None for k in kinds(c, full_every)]


def mlp(c: Config, **changes: Any) -> Mlp:
    """Llama's feed-forward with what differs."""
    fields: dict[str, Any] = {"size": c["intermediate_size"]}
    if "act" not in changes:
        fields["act"] = activation(c["hidden_act"])
    return Mlp(**{**fields, **changes})


def activation(name: str) -> Act:
    """Our word for a checkpoint's. Raises StartupError for one that is not known."""
    if name not in ACTS:
        raise StartupError(
            f"config.json: activation {name!r} is not supported; supported: {', '.join(ACTS)}"
        )
    return ACTS[name]


def rms(c: Config) -> Norm:
    """Llama's norm."""
    return Norm(eps=c.get("rms_norm_eps", 1e-6))


def layer_norm(c: Config, eps: str = "layer_norm_eps") -> Norm:
    """LayerNorm; `eps`: the key."""
    return Norm("layer", c[eps])


def biases(c: Config) -> frozenset[str]:
    """Llama's options."""
    found: frozenset[str] = frozenset()
    if c.get("attention_bias"):
        found |= QKV | OUT
    if c.get("mlp_bias"):
        found |= MLP
    return found
