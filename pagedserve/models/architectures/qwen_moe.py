"""Qwen 2 and 3 with experts, and the OLMoE kind: a softmax router, some layers dense."""

from __future__ import annotations

from pagedserve.models.architectures.llama import (
    HEAD_NORMS,
    NAMES,
    QKV,
    activation,
    attn,
    biases,
    decoder,
    mlp,
    rms,
)
from pagedserve.models.architectures.qwen2 import window
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import Attn, DecoderSpec, Layer, Mlp, Moe

EXPERTS = {
    "router": "mlp.gate",
    "expert_gate": "mlp.experts.{e}.gate_proj",
    "expert_up": "mlp.experts.{e}.up_proj",
    "expert_down": "mlp.experts.{e}.down_proj",
}
SHARED = {
    "shared_gate": "mlp.shared_expert.gate_proj",
    "shared_up": "mlp.shared_expert.up_proj",
    "shared_down": "mlp.shared_expert.down_proj",
    "shared_router": "mlp.shared_expert_gate",
}


@arch("Qwen2MoeForCausalLM")
def qwen2_moe(c: Config) -> DecoderSpec:
    shared = mlp(c, size=c["shared_expert_intermediate_size"])
    moe = softmax_moe(c, c["num_experts"], c["moe_intermediate_size"], shared)

    def layer(i: int) -> Layer:
        return Layer(attn(c, window=window(c, i)), moe if sparse(c, i) else mlp(c))

    return decoder(
        c,
        layer=layer,
        names={**NAMES, **EXPERTS, **SHARED},
        biases=frozenset(QKV) if c["qkv_bias"] else frozenset(),
    )


@arch("Qwen3MoeForCausalLM")
def qwen3_moe(c: Config) -> DecoderSpec:
    count = c.get("num_experts") or c["num_local_experts"]
    moe = softmax_moe(c, count, c["moe_intermediate_size"])

    def layer(i: int) -> Layer:
        attention = attn(c, qk_norm=rms(c), window=window(c, i))
        return Layer(attention, moe if sparse(c, i) else mlp(c))

    return decoder(c, layer=layer, names={**NAMES, **EXPERTS, **HEAD_NORMS}, biases=biases(c))


@arch("OlmoeForCausalLM")
def olmoe(c: Config) -> DecoderSpec:
    moe = softmax_moe(c, c["num_experts"], c["intermediate_size"])
    return decoder(
        c,
        layer=lambda i: Layer(wide_norm(c), moe),
        names={**NAMES, **EXPERTS, **HEAD_NORMS},
        biases=biases(c),
    )


@arch("FlexOlmoForCausalLM")
def flex_olmo(c: Config) -> DecoderSpec:
    moe = softmax_moe(c, c["num_experts"], c["intermediate_size"])
    after = {
        "post_attn": "post_attention_layernorm",
        "post_ffn": "post_feedforward_layernorm",
    }
    names = {**NAMES, **EXPERTS, **HEAD_NORMS, **after}
    return decoder(
        c,
        layer=lambda i: Layer(wide_norm(c), moe),
        names={role: name for role, name in names.items() if role not in ("pre_attn", "pre_ffn")},
        biases=biases(c),
    )


def wide_norm(c: Config) -> Attn:
    """Attention whose q and k are normalised over all heads."""
    return attn(c, qk_norm=rms(c), qk_norm_over="all heads", clip=c.get("clip_qkv"))


def softmax_moe(c: Config, experts: int, size: int, shared: Mlp | None = None) -> Moe:
    """A softmax router; `shared` behind a gate of its own."""
    return Moe(
        experts,
        c["num_experts_per_tok"],
        size,
        renorm=c["norm_topk_prob"],
        act=activation(c["hidden_act"]),
        shared=shared,
        shared_gate=shared is not None,
    )


def sparse(c: Config, i: int) -> bool:
    """Whether layer i has experts."""
    return i not in (c.get("mlp_only_layers") or ()) and (i + 1) % c["decoder_sparse_step"] == 0
