"""Hunyuan: Llama whose heads of q and k are normalised after the rotation."""

from __future__ import annotations

from pagedserve.models.architectures.llama import NAMES, attn, biases, decoder, mlp, rms, rope
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import DecoderSpec, Layer, Rope

HEAD_NORMS = {"q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"}


@arch("HunYuanDenseV1ForCausalLM")
def hunyuan(c: Config) -> DecoderSpec:
    refuse(c, "use_cla")
    attention = attn(c, rope=rotation(c), qk_norm=rms(c), norm_after_rope=True)
    fixed = {"stretched_positions": None} if c["rope_parameters"].get("alpha") else {}
    return decoder(
        c,
        layer=lambda i: Layer(attention, mlp(c)),
        names={**NAMES, **HEAD_NORMS},
        biases=biases(c),
        **fixed,
    )


def rotation(c: Config) -> Rope:
    """With an `alpha`, "dynamic" is a larger theta and has nothing to do with the length."""
    plain, alpha = rope(c), c["rope_parameters"].get("alpha")
    if not alpha or c["rope_parameters"]["rope_type"] != "dynamic":
        return plain
    return rope(c, theta=plain.theta * alpha ** (plain.dim / (plain.dim - 2)), scaling={})
