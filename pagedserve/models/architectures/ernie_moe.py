"""ERNIE 4.5 with experts: pairs rotated, a softmax router whose choice is corrected."""

from __future__ import annotations

from pagedserve.models.architectures.deepseek import EXPERTS
from pagedserve.models.architectures.llama import (
    MLP,
    NAMES,
    OUT,
    QKV,
    activation,
    attn,
    decoder,
    mlp,
    rope,
)
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Moe


@arch("Ernie4_5_MoeForCausalLM")
def ernie4_5_moe(c: Config) -> DecoderSpec:
    size, shared = c["moe_intermediate_size"], c["moe_num_shared_experts"]
    moe = Moe(
        c["moe_num_experts"],
        c["moe_k"],
        size,
        bias=True,
        act=activation(c["hidden_act"]),
        shared=mlp(c, size=size * shared) if shared else None,
    )
    count = c["num_hidden_layers"]
    first, last = c["moe_layer_start_index"], c["moe_layer_end_index"]
    last = count - 1 if last == -1 else last

    def layer(i: int) -> Layer:
        sparse = first <= i <= last and (i + 1) % c["moe_layer_interval"] == 0
        return Layer(attn(c, rope=rope(c, interleaved=True)), moe if sparse else mlp(c))

    return decoder(
        c,
        layer=layer,
        names={**NAMES, **EXPERTS, "router_bias": "mlp.moe_statics.e_score_correction_bias"},
        biases=(QKV | OUT | MLP) if c["use_bias"] else frozenset(),
        ignored=(r"^model\.mtp_",),
    )
