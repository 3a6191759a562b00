"""gpt-oss: sinks, alternating windows, biases, and clamped experts that are stored in pairs."""

from __future__ import annotations

from pagedserve.errors import StartupError
from pagedserve.models.architectures.llama import NAMES, OUT, QKV, attn, decoder, windows
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Moe

EXPERTS = {
    "sinks": "self_attn.sinks",
    "router": "mlp.router",
    "expert_gate_up": "mlp.experts.gate_up_proj",
    "expert_gate_up_bias": "mlp.experts.gate_up_proj_bias",
    "expert_down": "mlp.experts.down_proj",
    "expert_down_bias": "mlp.experts.down_proj_bias",
}


@arch("GptOssForCausalLM")
def gpt_oss(c: Config) -> DecoderSpec:
    if c.get("swiglu_alpha", 1.702) != 1.702:
        raise StartupError(f"config.json: swiglu_alpha must be 1.702, got {c['swiglu_alpha']}")
    moe = Moe(
        c["num_local_experts"],
        c["num_experts_per_tok"],
        c["intermediate_size"],
        score="softmax of chosen",
        act="clamped_silu",
        limit=c.get("swiglu_limit", 7.0),
        stored="column pairs",
    )

    def layer(i: int) -> Layer:
        return Layer(attn(c, window=windows(c, 2)[i], sinks=True), moe)

    biases = frozenset({"router"}) | (QKV | OUT if c["attention_bias"] else frozenset())
    return decoder(c, layer=layer, names={**NAMES, **EXPERTS}, biases=biases)
