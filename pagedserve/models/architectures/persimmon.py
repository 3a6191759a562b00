"""Persimmon: LayerNorms, also of heads, q, k, v of each head together, and ReLU squared."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NAMES, NORMS, attn, decoder, layer_norm, mlp, rope
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer

PERSIMMON = {
    "final_norm": "model.final_layernorm",
    "qkv": "self_attn.query_key_value",
    "out": "self_attn.dense",
    "q_norm": "self_attn.q_layernorm",
    "k_norm": "self_attn.k_layernorm",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
BIASES = NORMS | {"qkv", "out", "up", "down", "q_norm", "k_norm"}


@arch("PersimmonForCausalLM")
def persimmon(c: Config) -> DecoderSpec:
    norm = layer_norm(c)
    attention = attn(
        c,
        kv_heads=c["num_attention_heads"],
        rope=rope(c, partial=0.5),
        packed="heads",
        qk_norm=norm if c.get("qk_layernorm", True) else None,
    )
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c, gated=False)),
        norm=norm,
        names={**NAMES, **PERSIMMON},
        biases=BIASES,
    )
