"""GPT BigCode (SantaCoder, StarCoder): GPT-2 whose heads share one key and one value."""

from __future__ import annotations

from pagedserve.models.architectures.gpt2 import attention, decoder, feed_forward
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import DecoderSpec, Layer, Positions


@arch("GPTBigCodeForCausalLM")
def gpt_bigcode(c: Config) -> DecoderSpec:
    refuse(c, "add_cross_attention")
    hidden, heads, shared = c["n_embd"], c["n_head"], c.get("multi_query", True)
    attn = attention(
        hidden,
        heads,
        1 if shared else heads,
        scale=(hidden // heads) ** -0.5 if c.get("scale_attn_weights", True) else 1.0,
        packed="qkv" if shared else "heads",
    )
    ffn = feed_forward(c["activation_function"], c.get("n_inner") or 4 * hidden)
    return decoder(
        c,
        hidden,
        [Layer(attn, ffn)] * c["n_layer"],
        max_positions=c["n_positions"],
        positions=Positions("learned", c["n_positions"]),
    )
