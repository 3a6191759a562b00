"""Ling (Bailing): shared experts, q, k, v in one tensor; 2 routes as DeepSeek V3 does.

`use_bias`, `use_qkv_bias`: of all of attention, of q, k, v alone. `norm_head`: the head's columns,
one hidden dimension over all words each, are of unit length.
"""

from __future__ import annotations

from pagedserve.models.architectures.deepseek import extra_layers
from pagedserve.models.architectures.llama import NAMES, activation, attn, decoder, mlp, rms, rope
from pagedserve.models.architectures.qwen_moe import EXPERTS
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import Attn, DecoderSpec, Layer, Mlp, Moe

OWN = {
    "embed": "model.word_embeddings",
    "qkv": "attention.query_key_value",
    "q_norm": "attention.query_layernorm",
    "k_norm": "attention.key_layernorm",
    "out": "attention.dense",
    "router_bias": "mlp.gate.expert_bias",
    "shared_gate": "mlp.shared_experts.gate_proj",
    "shared_up": "mlp.shared_experts.up_proj",
    "shared_down": "mlp.shared_experts.down_proj",
}


@arch("BailingMoeForCausalLM")
def bailing_moe(c: Config) -> DecoderSpec:
    refuse(c, "multi_gate", "use_qk_norm")
    moe = Moe(
        c["num_experts"],
        c["num_experts_per_tok"],
        c["moe_intermediate_size"],
        renorm=c.get("norm_topk_prob", True),
        act=activation(c["hidden_act"]),
        shared=shared(c),
    )
    return bailing(c, attn(c, packed="qkv"), moe)


@arch("BailingMoeV2ForCausalLM")
def bailing_moe_v2(c: Config) -> DecoderSpec:
    share = c["rotary_dim"] / c["head_dim"] if "rotary_dim" in c else 1.0
    norm = rms(c) if c.get("use_qk_norm", True) else None
    moe = Moe(
        c["num_experts"],
        c["num_experts_per_tok"],
        c["moe_intermediate_size"],
        score="sigmoid",
        renorm=c["num_experts_per_tok"] > 1,
        renorm_eps=1e-20,
        groups=(c["n_group"], c["topk_group"]),
        scale=c["routed_scaling_factor"],
        bias=True,
        act=activation(c["hidden_act"]),
        shared=shared(c),
    )
    return bailing(c, attn(c, packed="qkv", qk_norm=norm, rope=rope(c, partial=share)), moe)


def bailing(c: Config, attention: Attn, moe: Moe) -> DecoderSpec:
    """Both."""
    dense = c.get("first_k_dense_replace", 0)
    both = {"qkv", "out"} if c.get("use_bias") else set()
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c) if i < dense else moe),
        names={**NAMES, **EXPERTS, **OWN},
        biases=frozenset(both | ({"qkv"} if c.get("use_qkv_bias") else set())),
        ignored=extra_layers(c),
        unit_head="columns" if c.get("norm_head") else None,
    )


def shared(c: Config) -> Mlp | None:
    """What every token takes, as wide as all shared experts together."""
    size = c.get("moe_shared_expert_intermediate_size") or c["moe_intermediate_size"]
    count = c.get("num_shared_experts")
    return mlp(c, size=size * count) if count else None
