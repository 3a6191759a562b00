"""SmolLM 3: Llama without rotation on every fourth layer, which alone may have a window."""

from __future__ import annotations

from pagedserve.models.architectures.llama import KINDS, attn, biases, decoder, kinds, mlp, rope
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer


@arch("SmolLM3ForCausalLM")
def smollm3(c: Config) -> DecoderSpec:
    every = c.get("no_rope_layer_interval", 4)
    rotated = c.get("no_rope_layers")  # 1 where a layer rotates, whatever the key says
    if rotated is None:
        rotated = [(i + 1) % every != 0 for i in range(c["num_hidden_layers"])]

    def layer(i: int) -> Layer:
        local = kinds(c)[i] == KINDS[1] if c.get("layer_types") else not rotated[i]
        window = c.get("sliding_window") if c.get("use_sliding_window") and local else None
        return Layer(attn(c, window=window, rope=rope(c) if rotated[i] else None), mlp(c))

    return decoder(c, layer=layer, biases=biases(c))
