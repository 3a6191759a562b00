"""Falcon, also as RefinedWeb: three layouts of one family.

7B      side by side after one norm; all heads share one key and one value
40B     side by side, a norm each; groups of heads with their key and value (11B: one norm)
RW      one after the other, with ALiBi and biases
"""

from __future__ import annotations

from pagedserve.models.architectures import bloom
from pagedserve.models.architectures.gpt2 import LINEARS, NORMS, attention, decoder, feed_forward
from pagedserve.models.architectures.llama import rope, stretched
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import Attn, DecoderSpec, Layer

SEQUENTIAL = {role: name for role, name in bloom.NAMES.items() if role != "embed_norm"}
ONE_NORM = {role: name for role, name in SEQUENTIAL.items() if role != "pre_ffn"}
TWO_NORMS = {**SEQUENTIAL, "pre_attn": "ln_attn", "pre_ffn": "ln_mlp"}
TRAINED = 2048  # tokens, where config.json says nothing


@arch("FalconForCausalLM", "RWForCausalLM")
def falcon(c: Config) -> DecoderSpec:
    refuse(c, "apply_residual_connection_post_layernorm")
    hidden = c.get("n_embed") or c["hidden_size"]
    grouped = c.get("new_decoder_architecture", "n_head_kv" in c)
    parallel = grouped or c.get("parallel_attn", False)
    names = SEQUENTIAL
    if parallel:
        names = TWO_NORMS if grouped and c.get("num_ln_in_parallel_attn") != 1 else ONE_NORM
    ffn = feed_forward(c.get("activation", "gelu"), c.get("ffn_hidden_size") or 4 * hidden)
    layer = Layer(heads(c, hidden, grouped), ffn, "parallel" if parallel else "sequential")
    positions = c.get("max_position_embeddings", TRAINED)
    return decoder(
        c,
        hidden,
        [layer] * (c.get("n_layer") or c["num_hidden_layers"]),
        max_positions=positions,
        stretched_positions=stretched(c, positions),
        names=names,
        biases=NORMS | LINEARS if c.get("bias") else NORMS,
        ignored=(r"rotary\w*\.inv_freq$",),
    )


def heads(c: Config, hidden: int, grouped: bool) -> Attn:
    """ALiBi's biases are scaled as the scores are."""
    count = c.get("n_head") or c["num_attention_heads"]
    kv_heads = 1 if c.get("multi_query", False) else count
    if grouped:
        kv_heads = c.get("n_head_kv") or c.get("num_kv_heads") or count
    if c.get("alibi"):
        factor = (hidden // count) ** -0.5
        return attention(hidden, count, kv_heads, packed="groups", alibi=8.0, alibi_factor=factor)
    turned = rope(c, dim=hidden // count)
    return attention(hidden, count, kv_heads, packed="groups", rope=turned)
