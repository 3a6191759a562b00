"""Ling, the first (Bailing): softmax experts beside shared ones, q, k, v as one tensor."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NAMES, activation, attn, decoder, mlp
from pagedserve.models.architectures.qwen_moe import EXPERTS
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import DecoderSpec, Layer, Moe

OWN = {
    "embed": "model.word_embeddings",
    "qkv": "attention.query_key_value",
    "out": "attention.dense",
    "shared_gate": "mlp.shared_experts.gate_proj",
    "shared_up": "mlp.shared_experts.up_proj",
    "shared_down": "mlp.shared_experts.down_proj",
}


@arch("BailingMoeForCausalLM")
def bailing_moe(c: Config) -> DecoderSpec:
    refuse(c, "multi_gate", "use_qk_norm")
    size, shared, dense = c["moe_intermediate_size"], c["num_shared_experts"], first_dense(c)
    moe = Moe(
        c["num_experts"],
        c["num_experts_per_tok"],
        size,
        renorm=c.get("norm_topk_prob", True),
        act=activation(c["hidden_act"]),
        shared=mlp(c, size=size * shared) if shared else None,
    )
    attention = attn(c, packed="qkv")
    both = {"qkv", "out"} if c.get("use_bias") else set()
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c) if i < dense else moe),
        names={**NAMES, **EXPERTS, **OWN},
        biases=frozenset(both | ({"qkv"} if c.get("use_qkv_bias") else set())),
        unit_head="columns" if c.get("norm_head") else None,
    )


def first_dense(c: Config) -> int:
    """How many layers have no experts."""
    return int(c.get("first_k_dense_replace", 0))
