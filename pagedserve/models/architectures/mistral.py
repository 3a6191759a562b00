"""Mistral: Llama whose every layer sees a window, if the checkpoint has one."""

from __future__ import annotations

from pagedserve.models.architectures.llama import attn, decoder, mlp
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer

DEFAULT_WINDOW = 4096  # of a config.json that says nothing; null there means no window


@arch("MistralForCausalLM")
def mistral(c: Config) -> DecoderSpec:
    window = c.get("sliding_window", DEFAULT_WINDOW)
    return decoder(c, layer=lambda i: Layer(attn(c, window=window), mlp(c)))
