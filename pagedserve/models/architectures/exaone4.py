"""EXAONE 4: norms behind, also of heads; where layers slide, those that do not have no rotation."""

from __future__ import annotations

from pagedserve.models.architectures.llama import KINDS, attn, kinds, mlp, rms, rope, windows
from pagedserve.models.architectures.olmo import normed_behind
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer


@arch("Exaone4ForCausalLM")
def exaone4(c: Config) -> DecoderSpec:
    hybrid = c.get("sliding_window") is not None
    every = c.get("sliding_window_pattern", 4) if hybrid else 1
    if isinstance(every, str):  # "LLLG": as many local as there are before the global one
        every = every.index("G") + 1

    def layer(i: int) -> Layer:
        turned = rope(c) if not hybrid or kinds(c, every)[i] == KINDS[1] else None
        attention = attn(c, window=windows(c, every)[i], rope=turned, qk_norm=rms(c))
        return Layer(attention, mlp(c))

    return normed_behind(c, layer)
