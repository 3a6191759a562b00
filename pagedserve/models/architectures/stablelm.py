"""StableLM: LayerNorms, a quarter rotated; side by side and with norms of heads if it says so."""

from __future__ import annotations

from pagedserve.models.architectures.llama import (
    NAMES,
    NORMS,
    QKV,
    attn,
    decoder,
    layer_norm,
    mlp,
    rope,
)
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer

HEAD_NORMS = {
    "q_norm": "self_attn.q_layernorm.norms.{h}",
    "k_norm": "self_attn.k_layernorm.norms.{h}",
}


@arch("StableLmForCausalLM")
def stablelm(c: Config) -> DecoderSpec:
    norm, parallel = layer_norm(c), c.get("use_parallel_residual")
    attention = attn(
        c,
        rope=rope(c, partial=0.25),
        qk_norm=norm if c.get("qk_layernorm") else None,
        qk_norm_over="own head",
    )
    names = {**NAMES, **HEAD_NORMS}
    if parallel:
        del names["pre_ffn"]
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c), "parallel" if parallel else "sequential"),
        norm=norm,
        names=names,
        biases=NORMS | (QKV if c.get("use_qkv_bias") else set()),
    )
