"""Feed-forward and experts, from a checkpoint's tensors.

E experts · S an expert's size · C hidden
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagedserve.kernels.experts import ExpertWeights
from pagedserve.layers.linear import Mapping
from pagedserve.layers.mlp import Activation, ClampedSilu, FeedForward, Xielu, activation
from pagedserve.layers.moe import MixtureOfExperts, Router
from pagedserve.models.assembly.reader import Reader
from pagedserve.quant.mxfp4 import BLOCK, dequantise
from pagedserve.spec import Matmul, Mlp, Moe

Ffn = FeedForward | MixtureOfExperts | Mapping


def feed_forward(reader: Reader, i: int) -> Ffn | None:
    """Of layer i, if it has any."""
    spec = reader.spec.layers[i].ffn
    if spec is None:
        return None
    if isinstance(spec, Matmul):
        hidden = reader.spec.hidden_size
        return Mapping(reader.linear({"ffn_map": hidden}, hidden, i))
    return experts(reader, spec, i) if isinstance(spec, Moe) else mlp(reader, spec, i)


def mlp(reader: Reader, spec: Mlp, i: int, prefix: str = "") -> FeedForward:
    """A feed-forward whose roles begin with `prefix`."""
    hidden = reader.spec.hidden_size
    if not spec.gated:
        up = reader.linear({f"{prefix}up": spec.size}, hidden, i)
    elif spec.packed:
        up = reader.linear({f"{prefix}gate_up": 2 * spec.size}, hidden, i)
    else:
        up = reader.linear({f"{prefix}gate": spec.size, f"{prefix}up": spec.size}, hidden, i)
    inner = reader.optional_norm(f"{prefix}inner_norm", spec.size, spec.inner_norm, i)
    down = reader.linear({f"{prefix}down": hidden}, spec.size, i)
    gate = spec.act if spec.gated and spec.act != "xielu" else None
    return FeedForward(up, down, activate(reader, spec, i), inner, gate)


def activate(reader: Reader, spec: Mlp, i: int) -> Activation:
    """The activation, with its own tensors where it has some."""
    if spec.act == "xielu":
        numbers = (reader.tensor("act", (1,), i, part=part) for part in ("alpha_p", "alpha_n"))
        return Xielu.of(*numbers)
    return activation(spec.act, spec.gated, reader.ops)


def experts(reader: Reader, spec: Moe, i: int) -> MixtureOfExperts:
    """Router, experts, and what all tokens share."""
    count, hidden = spec.experts, reader.spec.hidden_size
    bias = None
    if reader.has_bias("router", i):
        bias = reader.tensor("router", (count,), i, part="bias", dtype=torch.float32)
    correction = None
    if spec.bias:
        # Some checkpoints hold it as [1, E].
        shape = reader.source.shape(reader.name("router_bias", i)) or (count,)
        stored = reader.tensor("router_bias", shape, i, part="", dtype=torch.float32)
        correction = stored.view(count)
    router = reader.tensor("router", (count, hidden), i, dtype=torch.float32)
    shared = None if spec.shared is None else mlp(reader, spec.shared, i, "shared_")
    gate = reader.linear({"shared_router": 1}, hidden, i) if spec.shared_gate else None
    weights = expert_weights(reader, spec, i)
    return MixtureOfExperts(
        Router.of(spec, router, bias, correction),
        reader.device.experts(weights),
        shared,
        gate,
        spec.on_input,
    )


def expert_weights(reader: Reader, spec: Moe, i: int) -> ExpertWeights:
    """All experts stacked: up [E, 2 · S, C], gate first, and down [E, C, S]."""
    act: Activation = (
        ClampedSilu(spec.limit)
        if spec.act == "clamped_silu"
        else activation(spec.act, True, reader.ops)
    )
    if spec.stored == "each":
        return experts_of_each(reader, spec, i, act)
    count, size, hidden = spec.experts, spec.size, reader.spec.hidden_size
    if spec.stored == "stacked":
        gate, up, down = (
            reader.tensor(role, (count * size, hidden), i, part="").view(count, size, hidden)
            for role in ("expert_gate", "expert_up", "expert_down")
        )
        return ExpertWeights(
            torch.cat((gate, up), 1), turned(down), None, None, act, spec.act, spec.limit
        )
    if spec.stored == "rows":
        up = reader.tensor("expert_gate_up", (count, 2 * size, hidden), i, part="")
        down = reader.tensor("expert_down", (count, hidden, size), i, part="")
        return ExpertWeights(up, down, None, None, act, spec.act, spec.limit)
    if reader.source.has(reader.name("expert_gate_up", i) + "_blocks"):
        up = from_mxfp4(reader, "expert_gate_up", (count, 2 * size, hidden), i)
        down = from_mxfp4(reader, "expert_down", (count, hidden, size), i)
    else:
        up = turned(reader.tensor("expert_gate_up", (count, hidden, 2 * size), i, part=""))
        down = turned(reader.tensor("expert_down", (count, size, hidden), i, part=""))
    up_bias = down_bias = None
    if "expert_gate_up_bias" in reader.spec.names:
        up_bias = reader.tensor("expert_gate_up_bias", (count, 2 * size), i, part="")
        down_bias = reader.tensor("expert_down_bias", (count, hidden), i, part="")
    if spec.stored == "column pairs":
        up = pairs_to_halves(up)
        up_bias = None if up_bias is None else pairs_to_halves(up_bias)
    return ExpertWeights(up, down, up_bias, down_bias, act, spec.act, spec.limit)


def experts_of_each(reader: Reader, spec: Moe, i: int, act: Activation) -> ExpertWeights:
    """Every expert has tensors of its own, read straight into their places."""
    count, size, hidden = spec.experts, spec.size, reader.spec.hidden_size
    up, down = reader.empty(count, 2 * size, hidden), reader.empty(count, hidden, size)
    biased = reader.at(e=0).has_bias("expert_up", i)
    up_bias = reader.empty(count, 2 * size) if biased else None
    down_bias = reader.empty(count, hidden) if biased else None
    for e in range(count):
        one = reader.at(e=e)
        places = (
            ("expert_gate", up[e, :size], up_bias[e, :size] if up_bias is not None else None),
            ("expert_up", up[e, size:], up_bias[e, size:] if up_bias is not None else None),
            ("expert_down", down[e], down_bias[e] if down_bias is not None else None),
        )
        for role, into, bias in places:
            one.read(role, into, i, later=True)
            if bias is not None:
                one.read(role, bias, i, part="bias", later=True)
    if not reader.device.takes_unread:
        reader.source.settle()
    return ExpertWeights(up, down, up_bias, down_bias, act, spec.act, spec.limit)


def from_mxfp4(reader: Reader, role: str, shape: tuple[int, int, int], i: int) -> Tensor:
    """A stack that is stored in 4 bits, already turned: [E, rows, columns] in the model's dtype."""
    count, rows, columns = shape
    blocks = reader.empty(count, rows, columns // BLOCK, BLOCK // 2, dtype=torch.uint8)
    scales = reader.empty(count, rows, columns // BLOCK, dtype=torch.uint8)
    reader.source.read(reader.name(role, i) + "_blocks", blocks)
    reader.source.read(reader.name(role, i) + "_scales", scales)
    stack = reader.empty(*shape)
    for expert in range(count):  # one at a time: the numbers on the way take four bytes each
        dequantise(blocks[expert], scales[expert], stack[expert])
    return stack


def turned(stacked: Tensor) -> Tensor:
    """[E, a, b] → [E, b, a], contiguous."""
    return stacked.transpose(1, 2).contiguous()


def pairs_to_halves(stacked: Tensor) -> Tensor:
    """[E, 2 · S, …] with gate and up in turns → gates, then ups."""
    return torch.cat((stacked[:, ::2], stacked[:, 1::2]), 1)
