"""Gemma 1 to 3: norms stored less one, a scaled embedding, GELU; then windows, caps, four norms."""

from __future__ import annotations

from pagedserve.models.architectures.llama import (
    HEAD_NORMS,
    NAMES,
    activation,
    attn,
    biases,
    decoder,
    kinds,
    mlp,
    rope,
)
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Norm

FOUR_NORMS = {
    "post_attn": "post_attention_layernorm",
    "pre_ffn": "pre_feedforward_layernorm",
    "post_ffn": "post_feedforward_layernorm",
}


@arch("GemmaForCausalLM")
def gemma(c: Config) -> DecoderSpec:
    return gemma_decoder(c, names=NAMES)


@arch("Gemma2ForCausalLM")
def gemma2(c: Config) -> DecoderSpec:
    return gemma_decoder(c, names={**NAMES, **FOUR_NORMS})


@arch("Gemma3ForCausalLM")
def gemma3(c: Config) -> DecoderSpec:
    norm = Norm(eps=c["rms_norm_eps"], offset=1.0)
    return gemma_decoder(c, names={**NAMES, **FOUR_NORMS, **HEAD_NORMS}, qk_norm=norm)


def gemma_decoder(c: Config, *, names: dict[str, str], qk_norm: Norm | None = None) -> DecoderSpec:
    """All three."""
    norm, act = Norm(eps=c["rms_norm_eps"], offset=1.0), c.get("hidden_activation")
    # Gemma 3 turns its windows by an angle of their own; older files call it a base frequency.
    local_theta = c.get("rope_local_base_freq") or (10000.0 if qk_norm else None)

    def layer(i: int) -> Layer:
        local = kinds(c)[i] == "sliding_attention"
        turned = rope(c, kinds(c)[i])
        if local and local_theta and "rope_type" in c["rope_parameters"]:
            turned = rope(c, theta=local_theta, scaling={})
        return Layer(
            attn(
                c,
                window=c["sliding_window"] if local else None,
                rope=turned,
                scale=(c.get("query_pre_attn_scalar") or c["head_dim"]) ** -0.5,
                softcap=c.get("attn_logit_softcapping"),
                qk_norm=qk_norm,
            ),
            mlp(c, act=activation(act or "gelu_pytorch_tanh")),
        )

    return decoder(
        c,
        layer=layer,
        norm=norm,
        names=names,
        biases=biases(c),
        embed_scale=c["hidden_size"] ** 0.5,
        logit_softcap=c.get("final_logit_softcapping"),
        tied_head=c.get("tie_word_embeddings", True),
    )
