"""Tern, an architecture that is in no library: what differs from Llama, and where its tensors are.

    pagedserve serve build/tern --architecture-file examples/custom_model/tern.py

Attention and feed-forward read the same norm and are added together. Heads are normalised before
the rotation; all layers but every `global_every`th see a window. The feed-forward has no gate, its
activation is relu squared, and the logits are capped.
"""

from pagedserve.models.architectures.llama import attn, decoder, rms
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Mlp

NAMES = {
    "embed": "tern.embed",
    "final_norm": "tern.norm",
    "head": "lm_head",
    "layer": "tern.blocks.{i}.",
    "pre_attn": "norm",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm",
    "out": "attn.out",
    "up": "ffn.up",
    "down": "ffn.down",
}


@arch("TernForCausalLM")
def tern(c: Config) -> DecoderSpec:
    def layer(i: int) -> Layer:
        window = c["sliding_window"] if (i + 1) % c["global_every"] else None
        mlp = Mlp(c["intermediate_size"], act="relu2", gated=False)
        return Layer(attn(c, window=window, qk_norm=rms(c)), mlp, order="parallel")

    return decoder(c, layer=layer, names=NAMES, prefix="tern.", logit_softcap=c["logit_softcap"])
