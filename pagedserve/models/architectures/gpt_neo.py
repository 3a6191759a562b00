"""GPT-Neo: GPT-2 with matrices of their own for q, k, v, scores unscaled, windows in between."""

from __future__ import annotations

from typing import Any

from pagedserve.models.architectures.gpt2 import BIASES, NAMES, attention, decoder, feed_forward
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Positions

OWN = {
    "q": "attn.attention.q_proj",
    "k": "attn.attention.k_proj",
    "v": "attn.attention.v_proj",
    "out": "attn.attention.out_proj",
}
ALTERNATING: list[Any] = [[["global", "local"], 12]]  # of a config.json that says nothing


@arch("GPTNeoForCausalLM", may_be_null=("intermediate_size",))
def gpt_neo(c: Config) -> DecoderSpec:
    hidden, heads = c["hidden_size"], c["num_heads"]
    ffn = feed_forward(c["activation_function"], c.get("intermediate_size") or 4 * hidden)
    # Files that transformers wrote say the same twice, and the longer form counts.
    patterns = c.get("attention_types") or ALTERNATING
    kinds = c.get("attention_layers") or [
        kind for pattern, times in patterns for kind in list(pattern) * times
    ]

    def layer(i: int) -> Layer:
        window = c["window_size"] if kinds[i] == "local" else None
        return Layer(attention(hidden, heads, scale=1.0, window=window), ffn)

    return decoder(
        c,
        hidden,
        (layer(i) for i in range(c["num_layers"])),
        max_positions=c["max_position_embeddings"],
        names={**NAMES, **OWN},
        biases=BIASES - {"q", "k", "v"},
        positions=Positions("learned", c["max_position_embeddings"]),
    )
