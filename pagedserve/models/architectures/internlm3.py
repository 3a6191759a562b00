"""InternLM 3 and IQuest Coder: Llama under other names."""

from __future__ import annotations

from pagedserve.models.architectures.llama import MLP, OUT, QKV, biases, decoder
from pagedserve.models.architectures.registry import Config, arch, refuse
from pagedserve.spec import DecoderSpec


@arch("InternLM3ForCausalLM")
def internlm3(c: Config) -> DecoderSpec:
    options = (("qkv_bias", QKV), ("bias", OUT | MLP))
    return decoder(c, biases=frozenset().union(*(roles for key, roles in options if c.get(key))))


@arch("IQuestCoderForCausalLM")
def iquest_coder(c: Config) -> DecoderSpec:
    refuse(c, "clip_qkv", "use_sliding_window")  # no published checkpoint has them
    return decoder(c, biases=biases(c))
