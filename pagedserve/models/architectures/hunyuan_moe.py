"""Hunyuan with experts: heads normalised after the rotation, experts beside a shared one."""

from __future__ import annotations

from pagedserve.errors import StartupError
from pagedserve.models.architectures.llama import (
    NAMES,
    activation,
    attn,
    biases,
    decoder,
    mlp,
    rms,
)
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Moe

EXPERTS = {
    "q_norm": "self_attn.query_layernorm",
    "k_norm": "self_attn.key_layernorm",
    "router": "mlp.gate.wg",
    "expert_gate": "mlp.experts.{e}.gate_proj",
    "expert_up": "mlp.experts.{e}.up_proj",
    "expert_down": "mlp.experts.{e}.down_proj",
    "shared_gate": "mlp.shared_mlp.gate_proj",
    "shared_up": "mlp.shared_mlp.up_proj",
    "shared_down": "mlp.shared_mlp.down_proj",
}


@arch("HunYuanMoEV1ForCausalLM")
def hunyuan_moe(c: Config) -> DecoderSpec:
    if c.get("use_cla") or c.get("cla_share_factor", 1) not in (1, None):
        raise StartupError("config.json: cross-layer attention (use_cla) is not supported")

    def layer(i: int) -> Layer:
        top_k, experts = (
            n[i] if isinstance(n, list) else n for n in (c["moe_topk"], c["num_experts"])
        )
        moe = Moe(
            experts, top_k, c["intermediate_size"], act=activation(c["hidden_act"]), shared=mlp(c)
        )
        return Layer(attn(c, qk_norm=rms(c), norm_after_rope=True), moe)

    return decoder(c, layer=layer, names={**NAMES, **EXPERTS}, biases=biases(c))
