"""BitNet b1.58 in 16 bits: Llama with ReLU squared, and norms of what the last matrices get."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NAMES, OUT, QKV, attn, decoder, mlp, rms
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer

INNER_NORMS = {"out_norm": "self_attn.attn_sub_norm", "inner_norm": "mlp.ffn_sub_norm"}


@arch("BitNetForCausalLM")
def bitnet(c: Config) -> DecoderSpec:
    norm = rms(c)
    return decoder(
        c,
        layer=lambda i: Layer(attn(c, out_norm=norm), mlp(c, inner_norm=norm)),
        names={**NAMES, **INNER_NORMS},
        biases=QKV | OUT if c.get("attention_bias") else frozenset(),
    )
