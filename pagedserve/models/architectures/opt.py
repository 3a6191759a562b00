"""OPT: GPT-2's layers under fairseq's names, ReLU; norms behind in one size, a narrow embedding."""

from __future__ import annotations

from pagedserve.models.architectures.gpt2 import LINEARS, NORMS, attention, decoder, feed_forward
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Norm, Positions

FAIRSEQ = {
    "head": "lm_head",
    "pre_attn": "self_attn_layer_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "pre_ffn": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
}
NAMES = {
    **FAIRSEQ,
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "layer": "model.decoder.layers.{i}.",
}
FINAL = {"final_norm": "model.decoder.final_layer_norm"}
NARROW = {"embed_in": "model.decoder.project_in", "embed_out": "model.decoder.project_out"}
OFFSET = 2  # rows of fairseq's tables that are no position's
EPS = 1e-5  # of fairseq's norms, whatever the config.json says


@arch("OPTForCausalLM")
def opt(c: Config) -> DecoderSpec:
    hidden, rows = c["hidden_size"], c["max_position_embeddings"] + OFFSET
    before, size = c.get("do_layer_norm_before", True), c.get("word_embed_proj_dim") or hidden
    names = {**NAMES, **FINAL} if before and not c.get("_remove_final_layer_norm") else NAMES
    layer = Layer(
        attention(hidden, c["num_attention_heads"]),
        feed_forward(c["activation_function"], c["ffn_dim"]),
        "sequential" if before else "post",
    )
    return decoder(
        c,
        hidden,
        [layer] * c["num_hidden_layers"],
        max_positions=c["max_position_embeddings"],
        norm=Norm("layer", EPS, bare=not c.get("layer_norm_elementwise_affine", True)),
        names=names if size == hidden else {**names, **NARROW},
        prefix="model.",
        biases=NORMS | LINEARS if c.get("enable_bias", True) else NORMS,
        positions=Positions("learned", rows, OFFSET),
        embed_size=size,
    )
