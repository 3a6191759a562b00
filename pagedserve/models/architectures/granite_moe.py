"""Granite with experts: its multipliers, a softmax of the chosen, all experts in two tensors."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NAMES, activation, attn, biases, decoder, mlp
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Mlp, Moe

EXPERTS = {
    "router": "block_sparse_moe.router.layer",
    "expert_gate_up": "block_sparse_moe.input_linear.weight",
    "expert_down": "block_sparse_moe.output_linear.weight",
    "shared_gate_up": "shared_mlp.input_linear",
    "shared_down": "shared_mlp.output_linear",
}


@arch("GraniteMoeForCausalLM")
def granite_moe(c: Config) -> DecoderSpec:
    return granite_decoder(c, None)


@arch("GraniteMoeSharedForCausalLM")
def granite_moe_shared(c: Config) -> DecoderSpec:
    size = c["shared_intermediate_size"]
    return granite_decoder(c, mlp(c, size=size, packed=True) if size else None)


def granite_decoder(c: Config, shared: Mlp | None) -> DecoderSpec:
    """Both."""
    moe = Moe(
        c["num_local_experts"],
        c["num_experts_per_tok"],
        c["intermediate_size"],
        score="softmax of chosen",
        act=activation(c["hidden_act"]),
        shared=shared,
        stored="rows",
    )
    return decoder(
        c,
        layer=lambda i: Layer(attn(c, scale=c["attention_multiplier"]), moe),
        names={**NAMES, **EXPERTS},
        biases=biases(c),
        embed_scale=c["embedding_multiplier"],
        residual_scale=c["residual_multiplier"],
        logit_scale=1 / c["logits_scaling"],
    )
