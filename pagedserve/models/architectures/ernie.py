"""ERNIE 4.5: Llama that rotates pairs of neighbours."""

from __future__ import annotations

from pagedserve.models.architectures.llama import MLP, OUT, QKV, attn, decoder, mlp, rope
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer


@arch("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM")
def ernie(c: Config) -> DecoderSpec:
    return decoder(
        c,
        layer=lambda i: Layer(attn(c, rope=rope(c, interleaved=True)), mlp(c)),
        biases=QKV | OUT | MLP if c.get("use_bias") else frozenset(),
    )
