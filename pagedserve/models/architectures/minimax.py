"""MiniMax M2: heads normalised at once, a partial rotation, a sigmoid router with a correction."""

from __future__ import annotations

from pagedserve.models.architectures.llama import (
    HEAD_NORMS,
    NAMES,
    activation,
    attn,
    decoder,
    rms,
    rope,
)
from pagedserve.models.architectures.mixtral import EXPERTS
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Moe


@arch("MiniMaxM2ForCausalLM")
def minimax_m2(c: Config) -> DecoderSpec:
    moe = Moe(
        c["num_local_experts"],
        c["num_experts_per_tok"],
        c["intermediate_size"],
        score="sigmoid",
        bias=True,
        act=activation(c["hidden_act"]),
    )
    rotated = c.get("rotary_dim")
    turned = rope(c, dim=rotated) if rotated else rope(c)
    return decoder(
        c,
        layer=lambda i: Layer(attn(c, qk_norm=rms(c), qk_norm_over="all heads", rope=turned), moe),
        names={
            **NAMES,
            **HEAD_NORMS,
            **EXPERTS,
            "router_bias": "block_sparse_moe.e_score_correction_bias",
        },
    )
