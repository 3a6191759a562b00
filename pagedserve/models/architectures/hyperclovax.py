"""HyperCLOVA X: Granite's multipliers, the last not divided by, and norms on both sides."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NAMES, attn, biases, decoder, head_dim, mlp
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer

SIDE_NORMS = {"post_attn": "post_norm1", "post_ffn": "post_norm2"}


@arch("HyperCLOVAXForCausalLM", may_be_null=("attention_multiplier",))
def hyperclovax(c: Config) -> DecoderSpec:
    scale = c.get("attention_multiplier")
    attention = attn(c, scale=head_dim(c) ** -0.5 if scale is None else scale)
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c)),
        names={**NAMES, **(SIDE_NORMS if c.get("use_post_norm", True) else {})},
        biases=biases(c),
        embed_scale=c["embedding_multiplier"],
        residual_scale=c["residual_multiplier"],
        logit_scale=c["logits_scaling"],
    )
