"""Ministral: Mistral with windows by layer; of the third generation with a growing query."""

from __future__ import annotations

from pagedserve.models.architectures.llama import attn, decoder, mlp, windows
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, QueryScale


@arch("MinistralForCausalLM")
def ministral(c: Config) -> DecoderSpec:
    return decoder(c, layer=lambda i: Layer(attn(c, window=windows(c)[i]), mlp(c)))


@arch("Ministral3ForCausalLM")
def ministral3(c: Config) -> DecoderSpec:
    p, scale = c["rope_parameters"], None
    if p.get("llama_4_scaling_beta"):
        length = p["original_max_position_embeddings"]
        scale = QueryScale("log_steps", length, p["llama_4_scaling_beta"])
    window = c.get("sliding_window")
    return decoder(c, layer=lambda i: Layer(attn(c, window=window, query_scale=scale), mlp(c)))
