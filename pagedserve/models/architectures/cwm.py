"""Code World Model: Llama with windows on three layers of four."""

from __future__ import annotations

from pagedserve.models.architectures.llama import MLP, attn, decoder, mlp, windows
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer


@arch("CwmForCausalLM")
def cwm(c: Config) -> DecoderSpec:
    def window(i: int) -> int | None:
        if c.get("layer_types"):
            return windows(c)[i]
        size: int = c["sliding_window"]
        return size if i % 4 else None

    return decoder(
        c,
        layer=lambda i: Layer(attn(c, window=window(i)), mlp(c)),
        biases=MLP if c.get("mlp_bias") else frozenset(),
    )
