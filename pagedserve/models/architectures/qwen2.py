"""Qwen 2 and 2.5: Llama with biases on q, k, v, and a window on the layers that say so."""

from __future__ import annotations

from pagedserve.models.architectures.llama import KINDS, QKV, attn, decoder, kinds, mlp
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer


@arch("Qwen2ForCausalLM")
def qwen2(c: Config) -> DecoderSpec:
    return decoder(
        c, layer=lambda i: Layer(attn(c, window=window(c, i)), mlp(c)), biases=frozenset(QKV)
    )


def window(c: Config, i: int) -> int | None:
    """Layer i's window: only where `use_sliding_window`, by `layer_types` or from a layer on."""
    if not c.get("use_sliding_window"):
        return None
    given = c.get("layer_types")
    slides = kinds(c)[i] == KINDS[1] if given else i >= c.get("max_window_layers", 28)
    size: int | None = c.get("sliding_window", 4096)
    return size if slides else None
