"""Llama 4, text: chunked attention, layers without angles, experts weighted on input."""

from __future__ import annotations

from pagedserve.models.architectures.llama import (
    NAMES,
    activation,
    attn,
    biases,
    decoder,
    mlp,
    rope,
)
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import Attn, DecoderSpec, Layer, Moe, Norm, QueryScale

EXPERTS = {
    **NAMES,
    "gate": "feed_forward.gate_proj",
    "up": "feed_forward.up_proj",
    "down": "feed_forward.down_proj",
    "router": "feed_forward.router",
    "expert_gate_up": "feed_forward.experts.gate_up_proj",
    "expert_down": "feed_forward.experts.down_proj",
    "shared_gate": "feed_forward.shared_expert.gate_proj",
    "shared_up": "feed_forward.shared_expert.up_proj",
    "shared_down": "feed_forward.shared_expert.down_proj",
}


@arch("Llama4ForCausalLM")
def llama4(c: Config) -> DecoderSpec:
    count, step = c["num_hidden_layers"], c["interleave_moe_layer_step"]
    sparse = c.get("moe_layers")
    if sparse is None:
        sparse = range(step - 1, count, step)
    moe = Moe(
        c["num_local_experts"],
        c["num_experts_per_tok"],
        c["intermediate_size"],
        score="sigmoid",
        renorm=False,
        on_input=True,
        act=activation(c["hidden_act"]),
        shared=mlp(c),
        stored="columns",
    )
    dense = mlp(c, size=c["intermediate_size_mlp"])

    def layer(i: int) -> Layer:
        return Layer(attention(c, i), moe if i in sparse else dense)

    return decoder(c, layer=layer, names=EXPERTS, biases=biases(c))


def attention(c: Config, i: int) -> Attn:
    """Layers with angles see a chunk and have normalised heads; those without see everything."""
    given, every = c.get("no_rope_layers"), c["no_rope_layer_interval"]
    if given[i] if given else (i + 1) % every:
        norm = Norm(eps=c["rms_norm_eps"], bare=True) if c["use_qk_norm"] else None
        return attn(
            c,
            rope=rope(c, interleaved=True),
            chunk=c["attention_chunk_size"],
            qk_norm=norm,
            norm_after_rope=True,
        )
    scale = QueryScale("log_steps", c["floor_scale"], c["attn_scale"], shift=1)
    return attn(c, rope=None, query_scale=scale if c["attn_temperature_tuning"] else None)
