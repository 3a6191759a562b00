"""MiMo: Qwen 2 with layers that predict several tokens at once, which are not used."""

from __future__ import annotations

from dataclasses import replace

from pagedserve.models.architectures.qwen2 import qwen2
from pagedserve.models.architectures.registry import Config, arch
from pagedserve.spec import DecoderSpec


@arch("MiMoForCausalLM")
def mimo(c: Config) -> DecoderSpec:
    spec = qwen2(c)
    return replace(spec, ignored=(*spec.ignored, r"^model\.mtp_layers\."))
