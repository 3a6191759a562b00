"""ChatGLM 2 and 3, and GLM-4 as its first upload: half of each head rotated, in pairs."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NORMS
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import Attn, DecoderSpec, Layer, Mlp, Norm, Rope

NAMES = {
    "embed": "transformer.embedding.word_embeddings",
    "final_norm": "transformer.encoder.final_layernorm",
    "head": "transformer.output_layer",
    "layer": "transformer.encoder.layers.{i}.",
    "pre_attn": "input_layernorm",
    "qkv": "self_attention.query_key_value",
    "out": "self_attention.dense",
    "pre_ffn": "post_attention_layernorm",
    "gate_up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}


@arch("ChatGLMModel", "ChatGLMForConditionalGeneration", "ChatGLMForCausalLM")
def chatglm(c: Config) -> DecoderSpec:
    refuse(c, "pre_seq_len", "quantization_bit")
    rms, last = c.get("rmsnorm", True), c.get("post_layer_norm", True)
    biases = frozenset() if rms else NORMS
    if c.get("add_bias_linear"):
        biases |= {"qkv", "out", "gate_up", "down"}
    if c.get("add_qkv_bias"):
        biases |= {"qkv"}
    normed = c.get("apply_residual_connection_post_layernorm")
    ffn = Mlp(c["ffn_hidden_size"], packed=True)
    layer = Layer(attention(c), ffn, "normed" if normed else "sequential")
    return DecoderSpec(
        hidden_size=c["hidden_size"],
        vocab_size=c["padded_vocab_size"],
        max_positions=c["seq_length"],
        layers=(layer,) * c["num_layers"],
        norm=Norm("rms" if rms else "layer", c["layernorm_epsilon"]),
        names={role: name for role, name in NAMES.items() if last or role != "final_norm"},
        prefix="transformer.",
        biases=biases,
        ignored=(r"rotary_pos_emb\.inv_freq$",),
        tied_head=c.get("tie_word_embeddings", False),
    )


def attention(c: Config) -> Attn:
    """With groups the queries come first; without, each head has its three together."""
    heads, size, grouped = c["num_attention_heads"], c["kv_channels"], c["multi_query_attention"]
    theta = 10000.0 * c.get("rope_ratio", 1)
    return Attn(
        heads,
        c["multi_query_group_num"] if grouped else heads,
        size,
        scale=size**-0.5,
        rope=Rope(theta, size // 2, interleaved=c.get("original_rope", True)),
        packed="qkv" if grouped else "heads",
    )
