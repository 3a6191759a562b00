"""Phi 3.5 with experts: LayerNorms, biases, and the two rounds of SparseMixer."""

from __future__ import annotations

from pagedserve.errors import StartupError
from pagedserve.models.architectures.llama import NAMES, OUT, QKV, activation, attn, decoder
from pagedserve.models.architectures.mixtral import EXPERTS
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Moe, Norm

ROUNDS = 2  # of SparseMixer: one expert each
BIASED_NORMS = frozenset({"pre_attn", "pre_ffn", "final_norm"})


@arch("PhimoeForCausalLM", "PhiMoEForCausalLM")
def phimoe(c: Config) -> DecoderSpec:
    if c["num_experts_per_tok"] != ROUNDS:
        raise StartupError(
            f"config.json: num_experts_per_tok must be {ROUNDS}, got {c['num_experts_per_tok']}"
        )
    moe = Moe(
        c["num_local_experts"],
        c["num_experts_per_tok"],
        c["intermediate_size"],
        score="sparsemixer",
        jitter=c["router_jitter_noise"],
        act=activation(c["hidden_act"]),
    )
    biases = BIASED_NORMS | (QKV | OUT if c["attention_bias"] else frozenset())
    return decoder(
        c,
        layer=lambda i: Layer(attn(c, window=c.get("sliding_window")), moe),
        norm=Norm("layer", c["rms_norm_eps"]),
        names={**NAMES, **EXPERTS},
        biases=biases | ({"head"} if c["lm_head_bias"] else frozenset()),
    )
