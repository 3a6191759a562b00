"""Helium: Llama that rotates pairs of neighbours."""

from __future__ import annotations

from pagedserve.models.architectures.llama import MLP, QKV, attn, decoder, mlp, rope
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer


@arch("HeliumForCausalLM")
def helium(c: Config) -> DecoderSpec:
    options = (("attention_bias", QKV), ("mlp_bias", MLP))
    return decoder(
        c,
        layer=lambda i: Layer(attn(c, rope=rope(c, interleaved=True)), mlp(c)),
        biases=frozenset().union(*(roles for key, roles in options if c.get(key))),
    )
