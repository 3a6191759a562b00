"""Phi 3 and 4: Llama with q, k, v in one tensor, gate and up in one, and LongRoPE."""

from __future__ import annotations

from dataclasses import replace

from pagedserve.errors import StartupError
from pagedserve.models.architectures.llama import NAMES, attn, decoder, mlp, rope
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Rope

PACKED = {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}


@arch("Phi3ForCausalLM")
def phi3(c: Config) -> DecoderSpec:
    attention = attn(c, packed="qkv", rope=rotation(c), window=c.get("sliding_window"))
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c, packed=True)),
        names={**NAMES, **PACKED},
    )


def rotation(c: Config) -> Rope:
    """The first files say "yarn" where they mean LongRoPE; no other scaling is known here."""
    found = rope(c)
    trained, longest = c["original_max_position_embeddings"], c["max_position_embeddings"]
    kind = found.scaling.get("rope_type", "longrope")
    if kind not in ("yarn", "longrope"):
        raise StartupError(
            f"config.json: rope type {kind!r} is not one of this architecture's; supported: "
            "default, longrope"
        )
    if kind == "longrope":
        return found
    older = {
        "rope_type": "longrope",
        "original_max_position_embeddings": trained,
        "factor": longest / trained,
    }
    return replace(found, scaling={**found.scaling, **older})
