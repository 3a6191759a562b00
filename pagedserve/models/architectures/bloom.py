"""BLOOM: ALiBi in the place of positions, a norm behind the embedding, q, k, v of each head."""

from __future__ import annotations

from pagedserve.models.architectures.gpt2 import attention, decoder, feed_forward
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer

NAMES = {
    "embed": "transformer.word_embeddings",
    "embed_norm": "transformer.word_embeddings_layernorm",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "layer": "transformer.h.{i}.",
    "pre_attn": "input_layernorm",
    "qkv": "self_attention.query_key_value",
    "out": "self_attention.dense",
    "pre_ffn": "post_attention_layernorm",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
TRAINED = 2048  # tokens, of all published ones; their config.json does not say


@arch("BloomForCausalLM")
def bloom(c: Config) -> DecoderSpec:
    # The published files have the second name of each, and transformers takes either.
    hidden = c.get("n_embed") or c["hidden_size"]
    heads = c.get("num_attention_heads") or c["n_head"]
    layers = c.get("num_hidden_layers") or c["n_layer"]
    attn = attention(hidden, heads, alibi=8.0, packed="heads")
    ffn = feed_forward("gelu_pytorch_tanh", 4 * hidden)
    normed = c.get("apply_residual_connection_post_layernorm")
    return decoder(
        c,
        hidden,
        [Layer(attn, ffn, "normed" if normed else "sequential")] * layers,
        max_positions=c.get("seq_length", TRAINED),
        names=NAMES,
    )
