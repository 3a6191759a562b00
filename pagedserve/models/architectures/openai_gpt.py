"""GPT, the first: GPT-2 with its norms behind each part and none at the end."""

from __future__ import annotations

from pagedserve.models.architectures.gpt2 import NAMES, attention, decoder, feed_forward
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Positions

OWN = {"embed": "transformer.tokens_embed", "positions": "transformer.positions_embed"}
ACTS: dict[str, str] = {"gelu": "gelu_new"}  # this family's own word for it


@arch("OpenAIGPTLMHeadModel")
def openai_gpt(c: Config) -> DecoderSpec:
    hidden, act = c["n_embd"], str(c["afn"])
    ffn = feed_forward(ACTS.get(act) or act, 4 * hidden)
    layer = Layer(attention(hidden, c["n_head"], packed="qkv"), ffn, "post")
    names = {role: name for role, name in NAMES.items() if role != "final_norm"}
    return decoder(
        c,
        hidden,
        [layer] * c["n_layer"],
        max_positions=c["n_positions"],
        names={**names, **OWN},
        positions=Positions("learned", c["n_positions"]),
        transposed=True,
    )
