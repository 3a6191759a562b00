"""Jais 2: LayerNorms, biases everywhere, and ReLU squared without a gate."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NORMS, attn, biases, decoder, layer_norm, mlp
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer


@arch("Jais2ForCausalLM")
def jais2(c: Config) -> DecoderSpec:
    return decoder(
        c,
        layer=lambda i: Layer(attn(c), mlp(c, gated=False)),
        norm=layer_norm(c),
        biases=NORMS | biases(c),
    )
