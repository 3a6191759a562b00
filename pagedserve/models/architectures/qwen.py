"""Qwen 1: Llama's mathematics under GPT-2's names; two methods for contexts past the trained."""

from __future__ import annotations

from pagedserve.models.architectures.llama import decoder, rope
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.models.rope_config import TRAINED
from pagedserve.spec import Attn, DecoderSpec, Layer, Mlp, Norm, QueryScale

NAMES = {
    "embed": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "layer": "transformer.h.{i}.",
    "pre_attn": "ln_1",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "pre_ffn": "ln_2",
    "gate": "mlp.w2",
    "up": "mlp.w1",
    "down": "mlp.c_proj",
}


@arch("QWenLMHeadModel")
def qwen(c: Config) -> DecoderSpec:
    ffn = Mlp(c["intermediate_size"] // 2)  # the file counts gate and up together
    further = c.get("use_dynamic_ntk") or c.get("use_logn_attn")
    other = frozenset() if c.get("no_bias", True) else {"out", "gate", "up", "down"}
    return decoder(
        c,
        layer=lambda i: Layer(attention(c), ffn),
        max_positions=c["seq_length"],
        stretched_positions=c.get("max_position_embeddings") if further else None,
        norm=Norm(eps=c["layer_norm_epsilon"]),
        names=NAMES,
        prefix="transformer.",
        biases=frozenset({"qkv"}) | other,
    )


def attention(c: Config) -> Attn:
    """By the longest context that is served, the rotary base grows in steps."""
    heads, size, length = c["num_attention_heads"], c["kv_channels"], c["seq_length"]
    scaling = {"rope_type": "doubling", TRAINED: length} if c.get("use_dynamic_ntk") else {}
    return Attn(
        heads,
        heads,
        size,
        scale=size**-0.5 if c.get("scale_attn_weights", True) else 1.0,
        rope=rope(c, dim=size, scaling=scaling),
        query_scale=QueryScale("log_n", length) if c.get("use_logn_attn") else None,
        packed="qkv",
    )
