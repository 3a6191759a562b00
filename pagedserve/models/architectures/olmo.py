"""OLMo: Llama with bare norms; from the second on with norms behind and over all heads."""

from __future__ import annotations

from collections.abc import Callable

from pagedserve.models.architectures.llama import (
    HEAD_NORMS,
    NAMES,
    OUT,
    QKV,
    attn,
    decoder,
    kinds,
    mlp,
    rms,
    rope_by_kind,
    windows,
)
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Norm

NORMS_BEHIND = {
    "post_attn": "post_attention_layernorm",
    "post_ffn": "post_feedforward_layernorm",
}


@arch("OlmoForCausalLM")
def olmo(c: Config) -> DecoderSpec:
    return decoder(
        c,
        layer=lambda i: Layer(attn(c, clip=c.get("clip_qkv")), mlp(c)),
        norm=Norm("layer", 1e-5, bare=True),
        biases=QKV | OUT if c.get("attention_bias") else frozenset(),
    )


@arch("Olmo2ForCausalLM")
def olmo2(c: Config) -> DecoderSpec:
    attention = attn(c, qk_norm=rms(c), qk_norm_over="all heads")
    return normed_behind(c, lambda i: Layer(attention, mlp(c)))


@arch("Olmo3ForCausalLM")
def olmo3(c: Config) -> DecoderSpec:
    def layer(i: int) -> Layer:
        attention = attn(
            c,
            window=windows(c, 4)[i],
            rope=rope_by_kind(c, kinds(c, 4)[i]),
            qk_norm=rms(c),
            qk_norm_over="all heads",
        )
        return Layer(attention, mlp(c))

    return normed_behind(c, layer)


def normed_behind(c: Config, layer: Callable[[int], Layer]) -> DecoderSpec:
    """Norms of what attention and feed-forward give, and of none of what they get."""
    before = ("pre_attn", "pre_ffn")
    names = {role: name for role, name in NAMES.items() if role not in before}
    return decoder(
        c,
        layer=layer,
        names={**names, **NORMS_BEHIND, **HEAD_NORMS},
        biases=QKV | OUT if c.get("attention_bias") else frozenset(),
    )
