"""StarCoder 2: LayerNorms, biases everywhere, and a feed-forward without a gate."""

from __future__ import annotations

from pagedserve.models.architectures.llama import (
    NAMES,
    NORMS,
    OUT,
    QKV,
    attn,
    decoder,
    layer_norm,
    mlp,
)
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer

FEED_FORWARD = {"up": "mlp.c_fc", "down": "mlp.c_proj"}


@arch("Starcoder2ForCausalLM")
def starcoder2(c: Config) -> DecoderSpec:
    window = c.get("sliding_window")
    return decoder(
        c,
        layer=lambda i: Layer(attn(c, window=window), mlp(c, gated=False)),
        norm=layer_norm(c, "norm_epsilon"),
        names={**NAMES, **FEED_FORWARD},
        biases=NORMS | (QKV | OUT | {"up", "down"} if c.get("use_bias", True) else set()),
    )
