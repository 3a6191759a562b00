"""GLM 4.5 to 4.7, dots.1 and their kin: sigmoid routers with a correction, dense first layers."""

from __future__ import annotations

from pagedserve.models.architectures.deepseek import (
    EXPERTS,
    LATENT,
    extra_layers,
    latent,
    routed,
    yarn_scale,
)
from pagedserve.models.architectures.llama import (
    HEAD_NORMS,
    NAMES,
    QKV,
    attn,
    decoder,
    kinds,
    mlp,
    rms,
    rope,
)
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Moe

BIASED = {True: frozenset(QKV), False: frozenset[str]()}


@arch("Glm4MoeForCausalLM")
def glm4_moe(c: Config) -> DecoderSpec:
    attention = attn(c, rope=rope(c, partial=0.5), qk_norm=rms(c) if c["use_qk_norm"] else None)
    moe, dense = sigmoid_moe(c), c["first_k_dense_replace"]
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c) if i < dense else moe),
        names={**NAMES, **HEAD_NORMS, **EXPERTS},
        biases=BIASED[c["attention_bias"]],
        ignored=extra_layers(c),
    )


@arch("Glm4MoeLiteForCausalLM")
def glm4_moe_lite(c: Config) -> DecoderSpec:
    moe, mla = sigmoid_moe(c), latent(c, scale=yarn_scale(c))
    given = c.get("mlp_layer_types")

    def layer(i: int) -> Layer:
        dense = given[i] == "dense" if given else i == 0
        return Layer(mla, mlp(c) if dense else moe)

    biases = frozenset({"q_a", "kv_a", "out"}) if c["attention_bias"] else frozenset[str]()
    return decoder(
        c,
        layer=layer,
        names={**NAMES, **LATENT, **EXPERTS},
        biases=biases,
        ignored=extra_layers(c),
    )


@arch("Dots1ForCausalLM")
def dots1(c: Config) -> DecoderSpec:
    moe, dense = sigmoid_moe(c), c["first_k_dense_replace"]

    def layer(i: int) -> Layer:
        window = c["sliding_window"] if kinds(c)[i] == "sliding_attention" else None
        return Layer(attn(c, qk_norm=rms(c), window=window), mlp(c) if i < dense else moe)

    return decoder(
        c, layer=layer, names={**NAMES, **HEAD_NORMS, **EXPERTS}, biases=BIASED[c["attention_bias"]]
    )


def sigmoid_moe(c: Config) -> Moe:
    """DeepSeek V3's router."""
    return routed(
        c,
        score="sigmoid",
        renorm=c["norm_topk_prob"],
        renorm_eps=1e-20,
        groups=(c["n_group"], c["topk_group"]),
        bias=True,
    )
