"""Orion: Llama with LayerNorms."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NORMS, biases, decoder
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Norm


@arch("OrionForCausalLM")
def orion(c: Config) -> DecoderSpec:
    return decoder(c, norm=Norm("layer", c["rms_norm_eps"]), biases=NORMS | biases(c))
