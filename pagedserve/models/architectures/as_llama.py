"""Aquila 1 and 2, and Xverse: Llama under other names, of an age that knew no `rope_theta`."""

from __future__ import annotations

from pagedserve.models.architectures.llama import biases, decoder
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec


@arch("AquilaForCausalLM", "AquilaModel", "XverseForCausalLM")
def as_llama(c: Config) -> DecoderSpec:
    return decoder(c, biases=biases(c))
