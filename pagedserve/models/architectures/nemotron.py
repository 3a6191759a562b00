"""Nemotron 3 and 4, Minitron: LayerNorms stored less one, and ReLU squared without a gate."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NORMS, attn, biases, decoder, mlp, rope
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Norm


@arch("NemotronForCausalLM")
def nemotron(c: Config) -> DecoderSpec:
    attention = attn(c, rope=rope(c, partial=0.5))
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c, gated=False)),
        norm=Norm("layer", c["norm_eps"], offset=1.0),
        biases=NORMS | biases(c),
    )
