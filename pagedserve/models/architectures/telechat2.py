"""TeleChat 2: Llama under BLOOM's names, k and v of each head together."""

from __future__ import annotations

from pagedserve.errors import StartupError
from pagedserve.models.architectures.llama import decoder, rope
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import Attn, DecoderSpec, Layer, Mlp, Norm

NAMES = {
    "embed": "transformer.word_embeddings",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "layer": "transformer.h.{i}.",
    "pre_attn": "input_layernorm",
    "q": "self_attention.query",
    "kv": "self_attention.key_value",
    "out": "self_attention.dense",
    "pre_ffn": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@arch("TeleChat2ForCausalLM")
def telechat2(c: Config) -> DecoderSpec:
    """Past `base_seqlen` its own code stretches the rotation, from the start where it was trained
    so; that is not served."""
    refuse(c, "logn", "embed_layernorm", "apply_residual_connection_post_layernorm")
    trained = c["base_seqlen"]
    if c.get("training_seqlen", trained) > trained:
        raise StartupError(f"config.json: training_seqlen beyond {trained} is not supported")
    hidden, heads = c["hidden_size"], c["n_head"]
    size = hidden // heads
    attention = Attn(
        heads,
        c.get("num_key_value_heads") or heads,
        size,
        scale=size**-0.5,
        rope=rope(c, dim=size),
        packed="pairs",
    )
    return decoder(
        c,
        layers=(Layer(attention, Mlp(c["ffn_hidden_size"])),) * c["n_layer"],
        max_positions=trained,
        norm=Norm(eps=c["layer_norm_epsilon"]),
        names=NAMES,
        prefix="transformer.",
        biases=frozenset({"out", "down"}),
    )
