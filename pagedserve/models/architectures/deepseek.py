"""DeepSeek V2 and V3: latent attention, and experts chosen within groups, beside shared ones."""

from __future__ import annotations

import math
from typing import Any

from pagedserve.errors import StartupError
from pagedserve.models.architectures.llama import NAMES, activation, decoder, mlp, rope
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Mla, Moe, Norm

LATENT = {
    "q_a": "self_attn.q_a_proj",
    "q_a_norm": "self_attn.q_a_layernorm",
    "q_b": "self_attn.q_b_proj",
    "kv_a": "self_attn.kv_a_proj_with_mqa",
    "kv_a_norm": "self_attn.kv_a_layernorm",
    "kv_b": "self_attn.kv_b_proj",
}
EXPERTS = {
    "router": "mlp.gate",
    "router_bias": "mlp.gate.e_score_correction_bias",
    "expert_gate": "mlp.experts.{e}.gate_proj",
    "expert_up": "mlp.experts.{e}.up_proj",
    "expert_down": "mlp.experts.{e}.down_proj",
    "shared_gate": "mlp.shared_experts.gate_proj",
    "shared_up": "mlp.shared_experts.up_proj",
    "shared_down": "mlp.shared_experts.down_proj",
}
CHOICES = ("greedy", "group_limited_greedy")


@arch("DeepseekV2ForCausalLM")
def deepseek_v2(c: Config) -> DecoderSpec:
    if c["topk_method"] not in CHOICES:
        raise StartupError(
            f"config.json: topk_method {c['topk_method']!r} is not supported; supported: "
            f"{', '.join(CHOICES)}"
        )
    limited = c["topk_method"] == CHOICES[1]
    groups = (c["n_group"], c["topk_group"]) if limited else (1, 1)
    moe = routed(c, score="softmax", renorm=False, groups=groups, group_score="best")
    return latent_decoder(c, moe, latent(c, scale=yarn_scale(c)))


@arch("DeepseekV3ForCausalLM")
def deepseek_v3(c: Config) -> DecoderSpec:
    groups = (c["n_group"], c["topk_group"])
    moe = routed(
        c, score="sigmoid", renorm=c["norm_topk_prob"], renorm_eps=1e-20, groups=groups, bias=True
    )
    return latent_decoder(c, moe, latent(c, scale=yarn_scale(c)))


def latent_decoder(c: Config, moe: Moe, mla: Mla) -> DecoderSpec:
    """Llama with both; the first layers are dense."""
    dense = c["first_k_dense_replace"]
    return decoder(
        c,
        layer=lambda i: Layer(mla, mlp(c) if i < dense else moe),
        names={**NAMES, **LATENT, **EXPERTS},
        biases=frozenset({"q_a", "kv_a", "out"}) if c.get("attention_bias") else frozenset(),
        ignored=extra_layers(c),
    )


def extra_layers(c: Config) -> tuple[str, ...]:
    """Tensors of the layer behind the last, which predicts several tokens at once: not used."""
    return (rf"^model\.layers\.{c['num_hidden_layers']}\.", r"rotary_emb\.inv_freq$")


def latent(c: Config, scale: float = 1.0) -> Mla:
    """The latent attention; `scale` multiplies the usual one."""
    nope, rotated = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    return Mla(
        heads=c["num_attention_heads"],
        nope_dim=nope,
        value_dim=c["v_head_dim"],
        latent_dim=c["kv_lora_rank"],
        q_rank=c["q_lora_rank"],
        scale=scale * (nope + rotated) ** -0.5,
        rope=rope(c, dim=rotated, interleaved=c.get("rope_interleave", True)),
        norm=Norm(eps=1e-6),
    )


def yarn_scale(c: Config) -> float:
    """What a stretched context multiplies the scores by."""
    p = c["rope_parameters"]
    factor, by = p.get("factor", 1.0), p.get("mscale_all_dim", 0)
    return (0.1 * by * math.log(factor) + 1.0) ** 2 if by and factor > 1 else 1.0


def routed(c: Config, **changes: Any) -> Moe:
    """The experts of both generations."""
    size = c["moe_intermediate_size"]
    act = activation(c["hidden_act"])
    shared = mlp(c, size=size * c["n_shared_experts"]) if c["n_shared_experts"] else None
    fields: dict[str, Any] = {
        "scale": c["routed_scaling_factor"],
        "act": act,
        "shared": shared,
        **changes,
    }
    return Moe(c["n_routed_experts"], c["num_experts_per_tok"], size, **fields)
