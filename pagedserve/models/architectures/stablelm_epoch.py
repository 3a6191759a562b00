"""StableLM under its first name: Llama with LayerNorms, a share of each head rotated."""

from __future__ import annotations

from pagedserve.errors import StartupError
from pagedserve.models.architectures.llama import NORMS, QKV, decoder
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Norm


@arch("StableLMEpochForCausalLM")
def stablelm_epoch(c: Config) -> DecoderSpec:
    if c.get("rotary_scaling_factor", 1.0) != 1.0:
        raise StartupError("config.json: rotary_scaling_factor other than 1 is not supported")
    return decoder(
        c,
        norm=Norm("layer", c["norm_eps"]),
        biases=NORMS | (QKV if c.get("use_qkv_bias") else frozenset()),
    )
