"""Mixtral: Mistral whose feed-forwards are experts, the best two of which answer."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NAMES, activation, attn, decoder
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Moe

EXPERTS = {
    "router": "block_sparse_moe.gate",
    "expert_gate": "block_sparse_moe.experts.{e}.w1",
    "expert_up": "block_sparse_moe.experts.{e}.w3",
    "expert_down": "block_sparse_moe.experts.{e}.w2",
}


@arch("MixtralForCausalLM")
def mixtral(c: Config) -> DecoderSpec:
    moe = Moe(
        c["num_local_experts"],
        c["num_experts_per_tok"],
        c["intermediate_size"],
        act=activation(c["hidden_act"]),
    )
    window = c.get("sliding_window")
    return decoder(
        c, layer=lambda i: Layer(attn(c, window=window), moe), names={**NAMES, **EXPERTS}
    )
