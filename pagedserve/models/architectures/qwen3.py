"""Qwen 3: Llama with a norm on each head of q and k, and Qwen 2's windows."""

from __future__ import annotations

from pagedserve.models.architectures.llama import HEAD_NORMS, NAMES, attn, biases, decoder, mlp, rms
from pagedserve.models.architectures.qwen2 import window
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer


@arch("Qwen3ForCausalLM")
def qwen3(c: Config) -> DecoderSpec:
    def layer(i: int) -> Layer:
        return Layer(attn(c, window=window(c, i), qk_norm=rms(c)), mlp(c))

    return decoder(c, layer=layer, names={**NAMES, **HEAD_NORMS}, biases=biases(c))
