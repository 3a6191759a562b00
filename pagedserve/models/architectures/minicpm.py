"""MiniCPM: Llama with muP's three factors, dense or with Mixtral's experts; 3 with latents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagedserve.models.architectures.deepseek import LATENT, latent, yarn_scale
from pagedserve.models.architectures.llama import (
    NAMES,
    OUT,
    activation,
    attn,
    biases,
    decoder,
    mlp,
    rope,
)
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import DecoderSpec, Layer, Mlp, Moe

EXPERTS = {
    "router": "mlp.gate",
    "expert_gate": "mlp.experts.{e}.w1",
    "expert_up": "mlp.experts.{e}.w3",
    "expert_down": "mlp.experts.{e}.w2",
}


@arch("MiniCPMForCausalLM")
def minicpm(c: Config) -> DecoderSpec:
    refuse(c, "sparse_config")
    layer = Layer(attn(c), ffn(c))
    return mup(c, layer, names={**NAMES, **EXPERTS}, biases=biases(c))


@arch("MiniCPM3ForCausalLM", may_be_null=("v_head_dim", "scale_depth", "dim_model_base"))
def minicpm3(c: Config) -> DecoderSpec:
    mla = replace(
        latent(c, scale=yarn_scale(c)),
        value_dim=c.get("v_head_dim") or c["hidden_size"] // c["num_attention_heads"],
        rope=rope(c, dim=c["qk_rope_head_dim"]),
    )
    both = OUT | {"q_a", "kv_a"}
    return mup(
        c,
        Layer(mla, mlp(c)),
        names={**NAMES, **LATENT},
        biases=both if c.get("attention_bias") else frozenset(),
    )


def mup(c: Config, layer: Layer, **changes: Any) -> DecoderSpec:
    """The factors of both; null is as good as none."""
    hidden, depth = c["hidden_size"], c["num_hidden_layers"] ** 0.5
    return decoder(
        c,
        layer=lambda i: layer,
        embed_scale=c["scale_emb"],
        residual_scale=(c["scale_depth"] or depth) / depth,
        logit_scale=(c["dim_model_base"] or hidden) / hidden,
        tied_head=c.get("tie_word_embeddings", True),  # the class ties, and most files say nothing
        **changes,
    )


def ffn(c: Config) -> Mlp | Moe:
    """Experts where the file counts some."""
    count, size = c.get("num_experts"), c["intermediate_size"]
    if not count:
        return mlp(c)
    return Moe(count, c["num_experts_per_tok"], size, act=activation(c["hidden_act"]))
