"""XGLM: OPT's layers with sines in the place of learned positions, and a scaled embedding."""

from __future__ import annotations

from pagedserve.models.architectures.gpt2 import attention, decoder, feed_forward
from pagedserve.models.architectures.opt import EPS, FAIRSEQ, OFFSET
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import DecoderSpec, Layer, Norm, Positions

NAMES = {
    **FAIRSEQ,
    "embed": "model.embed_tokens",
    "final_norm": "model.layer_norm",
    "layer": "model.layers.{i}.",
}


@arch("XGLMForCausalLM")
def xglm(c: Config) -> DecoderSpec:
    refuse(c, "add_cross_attention")
    hidden, positions = c["d_model"], c["max_position_embeddings"]
    attn = attention(hidden, c["attention_heads"])
    ffn = feed_forward(c["activation_function"], c["ffn_dim"])
    return decoder(
        c,
        hidden,
        [Layer(attn, ffn)] * c["num_layers"],
        max_positions=positions,
        norm=Norm("layer", EPS),
        names=NAMES,
        prefix="model.",
        ignored=(r"embed_positions\.weights$",),
        positions=Positions("sines", positions + OFFSET, OFFSET),
        embed_scale=hidden**0.5 if c.get("scale_embedding", True) else 1.0,
    )
