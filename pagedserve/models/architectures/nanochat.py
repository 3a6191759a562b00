"""nanochat: Llama with bare norms, also of the embedding and of turned heads, turned backwards."""

from __future__ import annotations

from pagedserve.models.architectures.llama import (
    HEAD_NORMS,
    NAMES,
    OUT,
    QKV,
    attn,
    decoder,
    mlp,
    rope,
)
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Norm

NANOCHAT = {"embed_norm": "model.norm", "up": "mlp.fc1", "down": "mlp.fc2"}


@arch("NanoChatForCausalLM")
def nanochat(c: Config) -> DecoderSpec:
    bare = Norm(eps=c["rms_norm_eps"], bare=True)
    attention = attn(c, rope=rope(c, backwards=True), qk_norm=bare, norm_after_rope=True)
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c, gated=False)),
        norm=bare,
        names={**NAMES, **HEAD_NORMS, **NANOCHAT},
        biases=QKV | OUT if c.get("attention_bias") else frozenset(),
        logit_softcap=c.get("final_logit_softcapping"),
    )
