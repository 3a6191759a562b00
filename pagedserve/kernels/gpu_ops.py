"""The ops between the matrices on a GPU: `ops.Ops`, and what is fused beyond it.

A namespace, as `reference` is one: each op is in the file of its name.
"""

from __future__ import annotations

from pagedserve.kernels.activation import (
    act_and_mul,
    gelu_and_mul,
    gelu_tanh_and_mul,
    silu_and_mul,
)
from pagedserve.kernels.angles import angles
from pagedserve.kernels.embedding import embed
from pagedserve.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from pagedserve.kernels.qk_rope_kv import qk_rope_kv
from pagedserve.kernels.reference import gelu_tanh
from pagedserve.kernels.rotary import rotary

__all__ = [
    "act_and_mul",
    "add_layer_norm",
    "add_rms_norm",
    "angles",
    "embed",
    "gelu_and_mul",
    "gelu_tanh",
    "gelu_tanh_and_mul",
    "layer_norm",
    "qk_rope_kv",
    "rms_norm",
    "rotary",
    "silu_and_mul",
]
