"""Baichuan 1 and 2: Llama with q, k, v as one tensor; the 13B have ALiBi."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NAMES, attn, decoder, mlp
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer

SECOND_VOCABULARY = 125696  # Baichuan 2's tokens


@arch("BaichuanForCausalLM", "BaiChuanForCausalLM")
def baichuan(c: Config) -> DecoderSpec:
    """Sizes share a class, and so do generations.

    Only the rotary 7B say `max_position_embeddings`; the 13B say `model_max_length` alone, whose
    code has no use for the other. The head is of unit rows in the second generation, known by its
    vocabulary, or by `z_loss_weight` where a finetune has changed that.
    """
    rotary = "max_position_embeddings" in c
    attention = attn(c, packed="qkv") if rotary else attn(c, packed="qkv", rope=None, alibi=8.0)
    second = c["vocab_size"] == SECOND_VOCABULARY or "z_loss_weight" in c
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c)),
        max_positions=c["max_position_embeddings"] if rotary else c["model_max_length"],
        names={**NAMES, "qkv": "self_attn.W_pack"},
        unit_head="rows" if second else None,
    )
