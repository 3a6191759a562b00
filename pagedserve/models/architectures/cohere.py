"""Command: attention and feed-forward side by side, LayerNorms without biases, scaled logits."""

from __future__ import annotations

from collections.abc import Callable

from pagedserve.models.architectures.llama import (
    HEAD_NORMS,
    KINDS,
    NAMES,
    attn,
    biases,
    decoder,
    kinds,
    layer_norm,
    mlp,
    rope,
    windows,
)
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import Attn, DecoderSpec, Layer


@arch("CohereForCausalLM")
def cohere(c: Config) -> DecoderSpec:
    attention = attn(
        c,
        rope=rope(c, interleaved=True),
        qk_norm=layer_norm(c) if c.get("use_qk_norm") else None,
        qk_norm_over="own head",
    )
    return side_by_side(c, lambda i: attention)


@arch("Cohere2ForCausalLM")
def cohere2(c: Config) -> DecoderSpec:
    every = c.get("sliding_window_pattern") or 4

    def attention(i: int) -> Attn:
        local = kinds(c, every)[i] == KINDS[1]
        turned = rope(c, interleaved=True) if local else None
        return attn(c, window=windows(c, every)[i], rope=turned)

    return side_by_side(c, attention)


def side_by_side(c: Config, attention: Callable[[int], Attn]) -> DecoderSpec:
    """All but attention."""
    names = {role: name for role, name in {**NAMES, **HEAD_NORMS}.items() if role != "pre_ffn"}
    return decoder(
        c,
        layer=lambda i: Layer(attention(i), mlp(c), "parallel"),
        norm=layer_norm(c),
        names=names,
        biases=biases(c),
        logit_scale=float(c["logit_scale"]),
        tied_head=c.get("tie_word_embeddings", True),
    )
