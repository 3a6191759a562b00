"""EXAONE 3 and 3.5: Llama under GPT-2's names."""

from __future__ import annotations

from pagedserve.models.architectures.llama import activation, attn, decoder, mlp
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Norm

NAMES = {
    "embed": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "layer": "transformer.h.{i}.",
    "pre_attn": "ln_1",
    "q": "attn.attention.q_proj",
    "k": "attn.attention.k_proj",
    "v": "attn.attention.v_proj",
    "out": "attn.attention.out_proj",
    "pre_ffn": "ln_2",
    "gate": "mlp.c_fc_0",
    "up": "mlp.c_fc_1",
    "down": "mlp.c_proj",
}


@arch("ExaoneForCausalLM")
def exaone(c: Config) -> DecoderSpec:
    ffn = mlp(c, act=activation(c["activation_function"]))
    return decoder(
        c,
        layers=(Layer(attn(c), ffn),) * c["num_layers"],
        norm=Norm(eps=c["layer_norm_epsilon"]),
        names=NAMES,
        prefix="transformer.",
    )
