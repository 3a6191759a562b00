"""GPT-2: LayerNorms, learned positions, biases everywhere, matrices stored the other way round.

And the pieces that the families which came of it say their differences with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pagedserve.models.architectures.llama import activation
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import Attn, DecoderSpec, Layer, Mlp, Norm, Positions

NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "layer": "transformer.h.{i}.",
    "pre_attn": "ln_1",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "pre_ffn": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
NORMS = frozenset({"embed_norm", "final_norm", "pre_attn", "pre_ffn"})
LINEARS = frozenset({"qkv", "q", "k", "v", "out", "up", "down"})
BIASES = NORMS | LINEARS
CAUSAL_MASKS = (r"\.attn\.(attention\.)?(bias|masked_bias|causal_mask)$",)


@arch("GPT2LMHeadModel")
def gpt2(c: Config) -> DecoderSpec:
    refuse(c, "add_cross_attention")
    hidden, heads = c["n_embd"], c["n_head"]
    ffn = feed_forward(c["activation_function"], c.get("n_inner") or 4 * hidden)

    def layer(i: int) -> Layer:
        scale = (hidden // heads) ** -0.5 if c.get("scale_attn_weights", True) else 1.0
        if c.get("scale_attn_by_inverse_layer_idx"):
            scale /= i + 1
        return Layer(attention(hidden, heads, scale=scale, packed="qkv"), ffn)

    return decoder(
        c,
        hidden,
        (layer(i) for i in range(c["n_layer"])),
        max_positions=c["n_positions"],
        positions=Positions("learned", c["n_positions"]),
        transposed=True,
    )


def decoder(c: Config, hidden: int, layers: Iterable[Layer], **changes: Any) -> DecoderSpec:
    """GPT-2 with what differs; every family says its `max_positions`."""
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "vocab_size": c["vocab_size"],
        "layers": tuple(layers),
        "names": NAMES,
        "prefix": "transformer.",
        "biases": BIASES,
        "ignored": CAUSAL_MASKS,
        "tied_head": c.get("tie_word_embeddings", True),
    }
    if "norm" not in changes:
        fields["norm"] = Norm("layer", c["layer_norm_epsilon"])
    return DecoderSpec(**{**fields, **changes})


def attention(hidden: int, heads: int, kv_heads: int | None = None, **changes: Any) -> Attn:
    """Heads that share the hidden size; as many of keys and values unless said."""
    size = hidden // heads
    fields: dict[str, Any] = {"scale": size**-0.5}
    return Attn(heads, kv_heads or heads, size, **{**fields, **changes})


def feed_forward(act: str, size: int) -> Mlp:
    """Two matrices, `act` (a checkpoint's word) between them."""
    return Mlp(size, activation(act), gated=False)
