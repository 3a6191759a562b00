"""Phi 1 to 2: attention and an ungated feed-forward side by side, biases everywhere."""

from __future__ import annotations

from pagedserve.models.architectures.llama import (
    NAMES,
    NORMS,
    OUT,
    QKV,
    attn,
    decoder,
    layer_norm,
    mlp,
    rope,
)
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer

PHI = {
    "final_norm": "model.final_layernorm",
    "out": "self_attn.dense",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "q_norm": "self_attn.q_layernorm",
    "k_norm": "self_attn.k_layernorm",
}
BIASES = NORMS | QKV | OUT | {"up", "down", "head", "q_norm", "k_norm"}


@arch("PhiForCausalLM")
def phi(c: Config) -> DecoderSpec:
    norm = layer_norm(c)
    attention = attn(c, rope=rope(c, partial=0.5), qk_norm=norm if c.get("qk_layernorm") else None)
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c, gated=False), "parallel"),
        norm=norm,
        names={role: name for role, name in {**NAMES, **PHI}.items() if role != "pre_ffn"},
        biases=BIASES,
    )
