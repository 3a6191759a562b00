"""DBRX: LayerNorms without biases, one matrix for q, k, v that is clamped, stacked experts."""

from __future__ import annotations

from pagedserve.errors import StartupError
from pagedserve.models.architectures.llama import activation
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import Attn, DecoderSpec, Layer, Moe, Norm, Rope

NAMES = {
    "embed": "transformer.wte",
    "final_norm": "transformer.norm_f",
    "head": "lm_head",
    "layer": "transformer.blocks.{i}.",
    "pre_attn": "norm_attn_norm.norm_1",
    "qkv": "norm_attn_norm.attn.Wqkv",
    "out": "norm_attn_norm.attn.out_proj",
    "pre_ffn": "norm_attn_norm.norm_2",
    "router": "ffn.router.layer",
    "expert_gate": "ffn.experts.mlp.w1",
    "expert_up": "ffn.experts.mlp.v1",
    "expert_down": "ffn.experts.mlp.w2",
}


@arch("DbrxForCausalLM")
def dbrx(c: Config) -> DecoderSpec:
    attention, ffn = c["attn_config"], c["ffn_config"]
    if ffn.get("moe_normalize_expert_weights", 1.0) not in (1, None):
        raise StartupError("config.json: ffn_config.moe_normalize_expert_weights must be 1 or null")
    heads, hidden = c["n_heads"], c["d_model"]
    head_dim = hidden // heads
    theta = attention.get("rope_theta") or c["rope_parameters"]["rope_theta"]
    attn = Attn(
        heads,
        attention.get("kv_n_heads", 1),
        head_dim,
        head_dim**-0.5,
        Rope(theta, head_dim),
        clip=attention.get("clip_qkv"),
        packed="qkv",
    )
    moe = Moe(
        ffn.get("moe_num_experts", 4),
        ffn.get("moe_top_k", 1),
        ffn.get("ffn_hidden_size", 3584),
        renorm=ffn.get("moe_normalize_expert_weights", 1.0) is not None,
        act=activation((ffn.get("ffn_act_fn") or {"name": "silu"})["name"]),
        stored="stacked",
    )
    return DecoderSpec(
        hidden_size=hidden,
        vocab_size=c["vocab_size"],
        max_positions=c["max_seq_len"],
        layers=(Layer(attn, moe),) * c["n_layers"],
        norm=Norm("layer", 1e-5),
        names=NAMES,
        prefix="transformer.",
        tied_head=c.get("tie_word_embeddings", False),
    )
