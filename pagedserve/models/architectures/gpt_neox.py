"""GPT-NeoX (Pythia, Dolly): q, k, v of each head together, a share of it rotated, two norms."""

from __future__ import annotations

from pagedserve.models.architectures.gpt2 import LINEARS, NORMS, attention, decoder, feed_forward
from pagedserve.models.architectures.llama import rope, stretched
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Norm

NAMES = {
    "embed": "gpt_neox.embed_in",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
    "layer": "gpt_neox.layers.{i}.",
    "pre_attn": "input_layernorm",
    "qkv": "attention.query_key_value",
    "out": "attention.dense",
    "pre_ffn": "post_attention_layernorm",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
BUFFERS = (r"\.attention\.(bias|masked_bias|rotary_emb\.\w+)$",)
SHARE = 0.25  # rotated of a head, where config.json says nothing


@arch("GPTNeoXForCausalLM")
def gpt_neox(c: Config) -> DecoderSpec:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    positions = c["max_position_embeddings"]
    turned = rope(c, dim=hidden // heads, partial=SHARE)
    attn = attention(hidden, heads, rope=turned, packed="heads")
    ffn = feed_forward(c["hidden_act"], c["intermediate_size"])
    parallel = c.get("use_parallel_residual", True)
    layer = Layer(attn, ffn, "parallel" if parallel else "sequential")
    unbiased = frozenset() if c.get("attention_bias", True) else {"qkv", "out"}
    return decoder(
        c,
        hidden,
        [layer] * c["num_hidden_layers"],
        max_positions=positions,
        stretched_positions=stretched(c, positions),
        norm=Norm("layer", c["layer_norm_eps"]),
        names=NAMES,
        prefix="gpt_neox.",
        biases=(NORMS | LINEARS) - unbiased,
        ignored=BUFFERS,
        tied_head=c.get("tie_word_embeddings", False),
    )
