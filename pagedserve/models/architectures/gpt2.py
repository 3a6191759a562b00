"""GPT-2: LayerNorms, learned positions, biases everywhere, matrices stored the other way round."""

from __future__ import annotations

from pagedserve.errors import StartupError
from pagedserve.models.architectures.llama import activation
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import Attn, DecoderSpec, Layer, Mlp, Norm, Positions

NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "layer": "transformer.h.{i}.",
    "pre_attn": "ln_1",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "pre_ffn": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
BIASES = frozenset({"final_norm", "pre_attn", "qkv", "out", "pre_ffn", "up", "down"})
CAUSAL_MASKS = (r"\.attn\.(bias|masked_bias)$",)


@arch("GPT2LMHeadModel")
def gpt2(c: Config) -> DecoderSpec:
    if c.get("add_cross_attention"):
        raise StartupError("cross attention is not supported")
    hidden, heads = c["n_embd"], c["n_head"]
    ffn = Mlp(c.get("n_inner") or 4 * hidden, activation(c["activation_function"]), gated=False)

    def layer(i: int) -> Layer:
        scale = (hidden // heads) ** -0.5 if c.get("scale_attn_weights", True) else 1.0
        if c.get("scale_attn_by_inverse_layer_idx"):
            scale /= i + 1
        return Layer(Attn(heads, heads, hidden // heads, scale, packed="qkv"), ffn)

    return DecoderSpec(
        hidden_size=hidden,
        vocab_size=c["vocab_size"],
        max_positions=c["n_positions"],
        layers=tuple(layer(i) for i in range(c["n_layer"])),
        norm=Norm("layer", c["layer_norm_epsilon"]),
        names=NAMES,
        prefix="transformer.",
        biases=BIASES,
        ignored=CAUSAL_MASKS,
        positions=Positions("learned", c["n_positions"]),
        tied_head=c.get("tie_word_embeddings", True),
        transposed=True,
    )
