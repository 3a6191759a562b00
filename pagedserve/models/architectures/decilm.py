"""DeciLM: Llama whose layers were chosen by search, each with its own heads, width, or neither."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NAMES, attn, biases, decoder, mlp
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import Attn, DecoderSpec, Layer, Matmul, Mlp

MAPS = {"attn_map": "self_attn.linear_attn", "ffn_map": "mlp.linear_mlp"}
NOT_SERVED = (
    "window_length",
    "num_sink_tokens",
    "sparsify",
    "unshifted_sink",
    "use_prefill_window_in_sink_attention",
)
STEP = 256  # widths are rounded up to its multiples


@arch("DeciLMForCausalLM", may_be_null=("intermediate_size",))
def decilm(c: Config) -> DecoderSpec:
    if "block_configs" not in c:
        kv_heads = c["num_key_value_heads_per_layer"]
        return decoder(
            c, layer=lambda i: Layer(attn(c, kv_heads=kv_heads[i]), mlp(c)), biases=biases(c)
        )
    blocks = c["block_configs"]
    return decoder(
        c,
        layer=lambda i: Layer(
            chosen_attention(c, blocks[i]["attention"]), chosen_mlp(c, blocks[i]["ffn"])
        ),
        names={**NAMES, **MAPS},
        biases=biases(c),
    )


def chosen_attention(c: Config, block: Config) -> Attn | Matmul | None:
    """Of one entry of `block_configs`."""
    refuse(block, *NOT_SERVED)
    if block.get("no_op"):
        return None
    if block.get("replace_with_linear"):
        return Matmul()
    return attn(c, kv_heads=c["num_attention_heads"] // block["n_heads_in_group"])


def chosen_mlp(c: Config, block: Config) -> Mlp | Matmul | None:
    """The same of its other half. The width is two thirds of `ffn_mult` times the hidden size."""
    refuse(block, "sparsify")
    if block.get("no_op"):
        return None
    if block.get("replace_with_linear"):
        return Matmul()
    size = int(2 * block["ffn_mult"] * c["hidden_size"] / 3)
    return mlp(c, size=-(-size // STEP) * STEP)
