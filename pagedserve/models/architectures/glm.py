"""GLM 4: Llama that rotates half a head by pairs of neighbours, gate and up in one tensor."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NAMES, QKV, attn, decoder, mlp, rope
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Tensors

PACKED = {"gate_up": "mlp.gate_up_proj"}
FOUR_NORMS = {"post_attn": "post_self_attn_layernorm", "post_ffn": "post_mlp_layernorm"}


@arch("GlmForCausalLM")
def glm(c: Config) -> DecoderSpec:
    return glm_decoder(c, {**NAMES, **PACKED})


@arch("Glm4ForCausalLM")
def glm4(c: Config) -> DecoderSpec:
    return glm_decoder(c, {**NAMES, **PACKED, **FOUR_NORMS})


def glm_decoder(c: Config, names: Tensors) -> DecoderSpec:
    """Both."""
    attention = attn(c, rope=rope(c, partial=0.5, interleaved=True))
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c, packed=True)),
        names=names,
        biases=QKV if c.get("attention_bias", True) else frozenset(),
    )
