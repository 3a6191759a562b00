"""InternLM 1: Llama with biases in attention. InternLM 2: q, k, v of a group of heads together."""

from __future__ import annotations

from pagedserve.models.architectures.llama import OUT, QKV, attn, decoder, mlp, rope
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer

NAMES2 = {
    "embed": "model.tok_embeddings",
    "final_norm": "model.norm",
    "head": "output",
    "layer": "model.layers.{i}.",
    "pre_attn": "attention_norm",
    "qkv": "attention.wqkv",
    "out": "attention.wo",
    "pre_ffn": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}


@arch("InternLMForCausalLM")
def internlm(c: Config) -> DecoderSpec:
    # Some files have an object of their own; what else it says acts past the trained length only.
    theta = (c.get("rotary") or {}).get("base", c["rope_parameters"]["rope_theta"])
    attention = attn(c, rope=rope(c, theta=theta))
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c)),
        biases=QKV | OUT if c.get("bias", True) else frozenset(),
    )


@arch("InternLM2ForCausalLM")
def internlm2(c: Config) -> DecoderSpec:
    return decoder(
        c,
        layer=lambda i: Layer(attn(c, packed="groups"), mlp(c)),
        names=NAMES2,
        biases=frozenset({"qkv", "out"}) if c.get("bias") else frozenset(),
    )
