"""Apertus: Llama with norms of heads, and xIELU without a gate."""

from __future__ import annotations

from pagedserve.models.architectures.llama import (
    HEAD_NORMS,
    NAMES,
    OUT,
    QKV,
    attn,
    decoder,
    mlp,
    rms,
)
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import DecoderSpec, Layer

APERTUS = {
    "pre_attn": "attention_layernorm",
    "pre_ffn": "feedforward_layernorm",
    "act": "mlp.act_fn",
}


@arch("ApertusForCausalLM", "Apertus1p5TextForCausalLM")
def apertus(c: Config) -> DecoderSpec:
    refuse(c, "output_vocab_size", "post_norm", "mlp_bias")
    return decoder(
        c,
        layer=lambda i: Layer(attn(c, qk_norm=rms(c)), mlp(c, gated=False)),
        names={**NAMES, **HEAD_NORMS, **APERTUS},
        biases=QKV | OUT if c.get("attention_bias") else frozenset(),
        ignored=(r"\.act_fn\.(beta|eps)$",),  # two constants of xIELU
    )
