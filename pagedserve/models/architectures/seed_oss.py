"""Seed-OSS: Llama with biases on q, k, v, and one for the output if it says so."""

from __future__ import annotations

from pagedserve.models.architectures.llama import MLP, OUT, QKV, decoder
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec


@arch("SeedOssForCausalLM")
def seed_oss(c: Config) -> DecoderSpec:
    options = (("attention_bias", QKV), ("attention_out_bias", OUT), ("mlp_bias", MLP))
    biases = [roles for key, roles in options if c.get(key)]
    return decoder(c, biases=frozenset().union(*biases))
