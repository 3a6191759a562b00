"""Jais: GPT-2 with ALiBi, SwiGLU and muP's factors."""

from __future__ import annotations

from pagedserve.models.architectures.gpt2 import BIASES, NAMES, attention, decoder, feed_forward
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import DecoderSpec, Layer, Mlp, Positions

GATED = {"gate": "mlp.c_fc2"}


@arch("JAISLMHeadModel")
def jais(c: Config) -> DecoderSpec:
    refuse(c, "add_cross_attention", "alibi_scaling")
    hidden, rows, gated = c["n_embd"], c["n_positions"], c["activation_function"] == "swiglu"
    size, learned = c.get("n_inner") or 4 * hidden, c["position_embedding_type"] == "learned"
    ffn = Mlp(size) if gated else feed_forward(c["activation_function"], size)

    def layer(i: int) -> Layer:
        scale = score_scale(c, hidden // c["n_head"])
        if c.get("scale_attn_by_inverse_layer_idx"):
            scale /= i + 1
        alibi = None if learned else 8.0
        return Layer(attention(hidden, c["n_head"], scale=scale, alibi=alibi, packed="qkv"), ffn)

    names = NAMES if learned else {role: n for role, n in NAMES.items() if role != "positions"}
    return decoder(
        c,
        hidden,
        (layer(i) for i in range(c["n_layer"])),
        max_positions=rows,
        names={**names, **GATED} if gated else names,
        biases=BIASES | ({"gate"} if gated else set()),
        ignored=(r"relative_pe\.slopes$", r"\.attn\.(bias|masked_bias)$"),
        positions=Positions("learned", rows) if learned else None,
        embed_scale=c.get("embeddings_scale") or c.get("mup_embeddings_scale", 1.0),
        logit_scale=c.get("width_scale")
        or c.get("mup_output_alpha", 1.0) * c.get("mup_width_scale", 1.0),
        transposed=True,
    )


def score_scale(c: Config, head_dim: int) -> float:
    """By the width itself in muP, by its root elsewhere."""
    if not c.get("scale_attn_weights", True):
        return 1.0
    by_width = c.get("scale_qk_dot_by_d") or c.get("mup_scale_qk_dot_by_d")
    return float(head_dim ** (-1.0 if by_width else -0.5))
