"""MPT: ALiBi or learned positions, q, k, v clipped or normalised, no biases as a rule."""

from __future__ import annotations

from typing import Any

from pagedserve.errors import StartupError
from pagedserve.models.architectures.gpt2 import BIASES, decoder, feed_forward
from pagedserve.models.architectures.gpt2 import attention as plain
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import Attn, DecoderSpec, Layer, Norm, Positions

NAMES = {
    "embed": "transformer.wte",
    "final_norm": "transformer.norm_f",
    "head": "lm_head",
    "layer": "transformer.blocks.{i}.",
    "pre_attn": "norm_1",
    "qkv": "attn.Wqkv",
    "out": "attn.out_proj",
    "pre_ffn": "norm_2",
    "up": "ffn.up_proj",
    "down": "ffn.down_proj",
    "q_norm": "attn.q_ln",
    "k_norm": "attn.k_ln",
}
NORMS = ("low_precision_layernorm", "layernorm")


@arch("MptForCausalLM", "MPTForCausalLM")
def mpt(c: Config) -> DecoderSpec:
    hidden, options = c["d_model"], c.get("attn_config") or {}
    norm, rows = Norm("layer", c.get("layer_norm_epsilon", 1e-5)), c["max_seq_len"]
    if c.get("norm_type", NORMS[0]) not in NORMS:
        raise StartupError(f"config.json: norm_type {c['norm_type']!r} is not supported")
    attn = attention(c, hidden, options, norm)
    ffn = feed_forward("gelu", int(c.get("expansion_ratio", 4) * hidden))
    learned = attn.alibi is None and c.get("learned_pos_emb", True)
    return decoder(
        c,
        hidden,
        [Layer(attn, ffn)] * c["n_layers"],
        max_positions=rows,
        norm=norm,
        names={**NAMES, "positions": "transformer.wpe"} if learned else NAMES,
        biases=frozenset() if c.get("no_bias", True) else BIASES,
        positions=Positions("learned", rows) if learned else None,
        logit_scale=c.get("logit_scale") or 1.0,
    )


def attention(c: Config, hidden: int, options: dict[str, Any], norm: Norm) -> Attn:
    """Of `attn_config`."""
    refuse(options, "prefix_lm", "rope", "qk_gn")
    if options.get("qk_ln") and options.get("clip_qkv"):  # it bounds before it normalises
        raise StartupError("config.json: qk_ln together with clip_qkv is not supported")
    kind, heads = options.get("attn_type", "multihead_attention"), c["n_heads"]
    kv_heads = {
        "multihead_attention": heads,
        "multiquery_attention": 1,
        "grouped_query_attention": options.get("kv_n_heads"),
    }
    if kv_heads.get(kind) is None:
        raise StartupError(f"config.json: attn_type {kind!r} is not supported")
    return plain(
        hidden,
        heads,
        kv_heads[kind],
        scale=options.get("softmax_scale") or (hidden // heads) ** -0.5,
        alibi=options.get("alibi_bias_max", 8) if options.get("alibi", True) else None,
        clip=options.get("clip_qkv") or None,
        qk_norm=norm if options.get("qk_ln") else None,
        qk_norm_over="all heads",
        packed="qkv",
    )
