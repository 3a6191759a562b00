"""Solar Pro: Llama with windows, some layers mixing in what an earlier one got."""

from __future__ import annotations

from pagedserve.errors import StartupError
from pagedserve.models.architectures.llama import attn, biases, decoder, mlp
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer

PAIRS = (("bskcn_1", "bskcn_3"), ("bskcn_2", "bskcn_4"))  # layers that keep, layers that mix


@arch("SolarForCausalLM")
def solar(c: Config) -> DecoderSpec:
    attention = attn(c, window=c.get("sliding_window"))
    return decoder(c, layer=lambda i: Layer(attention, mlp(c), skip=skip(c, i)), biases=biases(c))


def skip(c: Config, i: int) -> tuple[int, float] | None:
    """The last layer that kept its input for layer i, and its share: the second, of inference."""
    found = [max(j for j in c[keep] if j <= i) for keep, mix in PAIRS if i in c[mix]]
    if len(found) > 1:
        raise StartupError(f"config.json: layer {i} is in both bskcn_3 and bskcn_4")
    return (found[0], c["bskcn_tv"][1]) if found else None
