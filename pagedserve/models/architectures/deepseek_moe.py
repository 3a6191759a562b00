"""DeepSeekMoE, the first DeepSeek with experts: Llama's attention, softmax experts, shared ones."""

from __future__ import annotations

from pagedserve.errors import StartupError
from pagedserve.models.architectures.deepseek import EXPERTS
from pagedserve.models.architectures.llama import NAMES, activation, attn, biases, decoder, mlp
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec, Layer, Moe


@arch("DeepseekForCausalLM")
def deepseek_moe(c: Config) -> DecoderSpec:
    if c.get("scoring_func", "softmax") != "softmax":
        raise StartupError(f"config.json: scoring_func {c['scoring_func']!r} is not supported")
    if not c.get("n_routed_experts"):  # the dense 7B is of Llama's class; this one may be, too
        return decoder(c, biases=biases(c))
    size, shared = c["moe_intermediate_size"], c.get("n_shared_experts")
    moe = Moe(
        c["n_routed_experts"],
        c["num_experts_per_tok"],
        size,
        renorm=c.get("norm_topk_prob", False),
        act=activation(c["hidden_act"]),
        shared=mlp(c, size=size * shared) if shared else None,
    )
    first, every = c.get("first_k_dense_replace", 0), c.get("moe_layer_freq", 1)

    def layer(i: int) -> Layer:
        return Layer(attn(c), moe if i >= first and i % every == 0 else mlp(c))

    return decoder(c, layer=layer, names={**NAMES, **EXPERTS}, biases=biases(c))
