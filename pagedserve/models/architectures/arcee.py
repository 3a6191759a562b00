"""AFM of Arcee: Llama whose feed-forward has no gate and squares what ReLU leaves."""

from __future__ import annotations

from pagedserve.models.architectures.llama import attn, biases, decoder, mlp
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer


@arch("ArceeForCausalLM")
def arcee(c: Config) -> DecoderSpec:
    return decoder(c, layer=lambda i: Layer(attn(c), mlp(c, gated=False)), biases=biases(c))
