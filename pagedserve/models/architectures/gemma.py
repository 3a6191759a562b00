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
    rope_by_kind,
    windows,
)
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import DecoderSpec, Layer, Norm, Tensors

FOUR_NORMS = {
    "post_attn": "post_attention_layernorm",
    "pre_ffn": "pre_feedforward_layernorm",
    "post_ffn": "post_feedforward_layernorm",
}
VAULT_NORMS = {"pre_ffn": "pre_feedforward_layernorm"}


@arch("GemmaForCausalLM")
def gemma(c: Config) -> DecoderSpec:
    return gemma_decoder(c, names=NAMES, full_every=1)


@arch("Gemma2ForCausalLM")
def gemma2(c: Config) -> DecoderSpec:
    return gemma_decoder(c, names={**NAMES, **FOUR_NORMS}, full_every=2)


@arch("VaultGemmaForCausalLM")
def vault_gemma(c: Config) -> DecoderSpec:
    return gemma_decoder(c, names={**NAMES, **VAULT_NORMS}, full_every=2)


@arch("Gemma3ForCausalLM")
def gemma3(c: Config) -> DecoderSpec:
    norm = Norm(eps=c["rms_norm_eps"], offset=1.0)
    every = c.get("sliding_window_pattern") or 6
    names = {**NAMES, **FOUR_NORMS, **HEAD_NORMS}
    return gemma_decoder(c, names=names, full_every=every, qk_norm=norm)


def gemma_decoder(
    c: Config, *, names: Tensors, full_every: int, qk_norm: Norm | None = None
) -> DecoderSpec:
    """All of them. `full_every`: see `kinds`."""
    refuse(c, "use_bidirectional_attention")
    older = c.get("hidden_act")  # whose "gelu", in the first files, means the approximation
    name = c.get("hidden_activation") or ("gelu_pytorch_tanh" if older in (None, "gelu") else older)
    # Gemma 3 turns its windows by an angle of their own.
    local_theta = (c.get("rope_local_base_freq") or 10000.0) if qk_norm else None

    def layer(i: int) -> Layer:
        attention = attn(
            c,
            window=windows(c, full_every)[i],
            rope=rope_by_kind(c, kinds(c, full_every)[i], local_theta=local_theta),
            scale=(c.get("query_pre_attn_scalar") or c["head_dim"]) ** -0.5,
            softcap=c.get("attn_logit_softcapping"),
            qk_norm=qk_norm,
        )
        return Layer(attention, mlp(c, act=activation(name)))

    return decoder(
        c,
        layer=layer,
        norm=Norm(eps=c["rms_norm_eps"], offset=1.0),
        names=names,
        biases=biases(c),
        embed_scale=c["hidden_size"] ** 0.5,
        logit_softcap=c.get("final_logit_softcapping"),
        tied_head=c.get("tie_word_embeddings", True),
    )
