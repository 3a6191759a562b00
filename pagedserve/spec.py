"""What a decoder-only architecture is, as data.

A spec is read from a checkpoint's config.json and can be printed, compared and tested; no torch
here. It says what the configuration and the family decide. What the checkpoint itself may add (a
bias that the family does not demand) is read from the tensors' names when they load.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm or LayerNorm over the last dimension; bias where the checkpoint has one."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021), NeoX halves.

    `dim`: rotated dimensions of a head, the first ones. `scaling`: the checkpoint's
    `rope_parameters`, if its type is not "default".
    """

    theta: float
    dim: int
    scaling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attn:
    """Multi-head attention with grouped key/value heads.

    `scale` multiplies the scores. `window`: tokens a query sees, itself included (None: all).
    `qk_norm`: over each head of q and k, before the rotation. `packed`: the checkpoint holds q, k,
    v as one tensor (role "qkv"), in that order.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    window: int | None = None
    qk_norm: Norm | None = None
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Mlp:
    """Feed-forward: down(act(gate) · up) where `gated`, else down(act(up))."""

    size: int
    act: Literal["silu", "gelu_tanh"] = "silu"
    gated: bool = True


@dataclass(frozen=True, slots=True)
class Layer:
    """One block of the residual stream: attention, then feed-forward, each behind a norm."""

    attn: Attn
    ffn: Mlp


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A whole model.

    names              role → checkpoint name without ".weight"; "layer" is the prefix of layer i
                       with `{i}` in it. A role that is absent is not computed
    prefix             beginning of the names that a checkpoint saved without its head leaves out
    biases             roles that have a bias in this family; any other role may have one
    buffers            regular expressions of tensors that are no parameters and may be there
    learned_positions  rows of a position table added to the embedding (0: none)
    tied_head          the head is the embedding, unless the checkpoint holds another one
    transposed         linear weights are stored [in, out] (Conv1D)
    """

    hidden_size: int
    vocab_size: int
    max_positions: int
    layers: tuple[Layer, ...]
    norm: Norm
    names: dict[str, str]
    prefix: str = ""
    biases: frozenset[str] = frozenset()
    buffers: tuple[str, ...] = ()
    learned_positions: int = 0
    tied_head: bool = False
    transposed: bool = False
