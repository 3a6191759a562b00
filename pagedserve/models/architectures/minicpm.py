"""MiniCPM: Llama with muP's three factors, dense or with Mixtral's experts."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NAMES, activation, attn, biases, decoder, mlp
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
    return decoder(
        c,
        layer=lambda i: Layer(attn(c), ffn(c)),
        names={**NAMES, **EXPERTS},
        biases=biases(c),
        embed_scale=c["scale_emb"],
        residual_scale=c["scale_depth"] / c["num_hidden_layers"] ** 0.5,
        logit_scale=c["dim_model_base"] / c["hidden_size"],
        tied_head=c.get("tie_word_embeddings", True),  # the class ties, and most files say nothing
    )


def ffn(c: Config) -> Mlp | Moe:
    """Experts where the file counts some."""
    count, size = c.get("num_experts"), c["intermediate_size"]
    if not count:
        return mlp(c)
    return Moe(count, c["num_experts_per_tok"], size, act=activation(c["hidden_act"]))
