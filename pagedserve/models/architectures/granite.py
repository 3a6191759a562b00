"""Granite: Llama with four multipliers; then with windows, sinks, a theta for each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagedserve.models.architectures.llama import NAMES, attn, biases, decoder, mlp, rope, windows
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Rope


@arch("GraniteForCausalLM")
def granite(c: Config) -> DecoderSpec:
    scale = c["attention_multiplier"]
    return multiplied(c, lambda i: Layer(attn(c, scale=scale), mlp(c)))


@arch("GraniteSWAForCausalLM")
def granite_windows(c: Config) -> DecoderSpec:
    thetas = c.get("layer_rope_theta")  # 0: no rotation
    full = [i % 4 == 0 for i in range(c["num_hidden_layers"])]

    def layer(i: int) -> Layer:
        seen = windows(c)[i] if c.get("layer_types") else None if full[i] else c["sliding_window"]
        turned: Rope | None = rope(c)
        if thetas is not None:
            turned = rope(c, theta=thetas[i]) if thetas[i] else None
        scale = c["attention_multiplier"]
        return Layer(attn(c, scale=scale, window=seen, sinks=True, rope=turned), mlp(c))

    return multiplied(c, layer, names={**NAMES, "sinks": "self_attn.sinks"})


def multiplied(c: Config, layer: Callable[[int], Layer], **changes: Any) -> DecoderSpec:
    """With the multipliers outside attention."""
    return decoder(
        c,
        layer=layer,
        biases=biases(c),
        embed_scale=c["embedding_multiplier"],
        residual_scale=c["residual_multiplier"],
        logit_scale=1 / c["logits_scaling"],
        **changes,
    )
