"""GPT-NeoX (Pythia, Dolly): q, k, v of each head together, a share of it rotated, two norms."""

from __future__ import annotations

from typing import Any

from pagedserve.models.architectures.gpt2 import LINEARS, NORMS, attention, decoder, feed_forward
from pagedserve.models.architectures.llama import rope, stretched
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Mlp, Norm

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
JAPANESE = {
    "embed": "gpt_neox_japanese.embed_in",
    "final_norm": "gpt_neox_japanese.final_layer_norm",
    "layer": "gpt_neox_japanese.layers.{i}.",
    "out.bias": "attention.dense_bias",
}
BUFFERS = (r"\.attention\.(bias|masked_bias|rotary_emb\.\w+)$",)


@arch("GPTNeoXForCausalLM")
def gpt_neox(c: Config) -> DecoderSpec:
    parallel = c.get("use_parallel_residual", True)
    unbiased = frozenset() if c.get("attention_bias", True) else {"qkv", "out"}
    return neox(
        c,
        feed_forward(c["hidden_act"], c["intermediate_size"]),
        parallel=parallel,
        share=0.25,
        biases=(NORMS | LINEARS) - unbiased,
        tied_head=c.get("tie_word_embeddings", False),
    )


@arch("GPTNeoXJapaneseForCausalLM")
def gpt_neox_japanese(c: Config) -> DecoderSpec:
    """One bias beside those of norms, of the last layer's attention; the checkpoint says so."""
    ffn = feed_forward(c["hidden_act"], int(c["intermediate_multiple_size"] * c["hidden_size"]))
    return neox(
        c,
        ffn,
        parallel=False,
        share=1.0,
        names={**NAMES, **JAPANESE},
        prefix="gpt_neox_japanese.",
        biases=NORMS,
    )


def neox(c: Config, ffn: Mlp, *, parallel: bool, share: float, **changes: Any) -> DecoderSpec:
    """Both. `share`: rotated of a head, where config.json says nothing."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    turned = rope(c, dim=hidden // heads, partial=share)
    attn = attention(hidden, heads, rope=turned, packed="heads")
    layer = Layer(attn, ffn, "parallel" if parallel else "sequential")
    positions = c["max_position_embeddings"]
    fields: dict[str, Any] = {
        "max_positions": positions,
        "stretched_positions": stretched(c, positions),
        "norm": Norm("layer", c["layer_norm_eps"]),
        "names": NAMES,
        "prefix": "gpt_neox.",
        "ignored": BUFFERS,
    }
    return decoder(c, hidden, [layer] * c["num_hidden_layers"], **{**fields, **changes})
