"""Qwen 3: Llama with a norm on each head of q and k, and Qwen 2's windows."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NAMES, OUT, QKV, Config, attn, decoder, mlp, rms
from pagedserve.models.architectures.qwen2 import window
from pagedserve.models.architectures.registry import arch
from pagedserve.spec import DecoderSpec, Layer

HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


@arch("Qwen3ForCausalLM")
def qwen3(c: Config) -> DecoderSpec:
    c = {"head_dim": 128, **c}

    def layer(i: int) -> Layer:
        return Layer(attn(c, window=window(c, i), qk_norm=rms(c)), mlp(c))

    biases = QKV | OUT if c.get("attention_bias") else frozenset()
    return decoder(c, layer=layer, names={**NAMES, **HEAD_NORMS}, biases=biases)
