"""BioGPT: OPT's layers with a scaled embedding."""

from __future__ import annotations

from pagedserve.models.architectures.gpt2 import attention, decoder, feed_forward
from pagedserve.models.architectures.opt import EPS, FAIRSEQ, OFFSET
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Norm, Positions

NAMES = {
    **FAIRSEQ,
    "embed": "biogpt.embed_tokens",
    "positions": "biogpt.embed_positions",
    "final_norm": "biogpt.layer_norm",
    "head": "output_projection",
    "layer": "biogpt.layers.{i}.",
}


@arch("BioGptForCausalLM")
def biogpt(c: Config) -> DecoderSpec:
    hidden, positions = c["hidden_size"], c["max_position_embeddings"]
    attn = attention(hidden, c["num_attention_heads"])
    ffn = feed_forward(c["hidden_act"], c["intermediate_size"])
    return decoder(
        c,
        hidden,
        [Layer(attn, ffn)] * c["num_hidden_layers"],
        max_positions=positions,
        norm=Norm("layer", EPS),
        names=NAMES,
        prefix="biogpt.",
        positions=Positions("learned", positions + OFFSET, OFFSET),
        embed_scale=hidden**0.5 if c.get("scale_embedding", True) else 1.0,
    )
