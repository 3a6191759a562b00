"""Youtu-LLM: latent attention with a dense feed-forward on every layer."""

from __future__ import annotations

from pagedserve.models.architectures.deepseek import LATENT, latent, yarn_scale
from pagedserve.models.architectures.llama import NAMES, decoder, mlp
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer


@arch("YoutuForCausalLM")
def youtu(c: Config) -> DecoderSpec:
    mla = latent(c, scale=yarn_scale(c))
    biased = frozenset({"q_a", "kv_a", "out"}) if c.get("attention_bias") else frozenset[str]()
    return decoder(c, layer=lambda i: Layer(mla, mlp(c)), names={**NAMES, **LATENT}, biases=biased)
