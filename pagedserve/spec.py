"""What a decoder-only architecture is, as data.

A spec is read from a checkpoint's config.json and can be printed, compared and tested; no torch
here. It says what the configuration and the family decide. What the checkpoint itself may add (a
bias that the family does not demand) is read from the tensors' names when they load.

    DecoderSpec ── Layer ─┬─ Attn | Mla | Matmul | None     attention, behind and before norms
                          └─ Mlp | Moe | Matmul | None      feed-forward, the same
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Act = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "xielu", "clamped_silu"]
Tensors = dict[str, str]  # role → checkpoint name


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm or LayerNorm over the last dimension; bias where the checkpoint has one.

    `offset` is added to the stored weight (Gemma: 1). `bare`: no weight at all.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021).

    `dim`: rotated dimensions of a head, the first ones. `scaling`: the checkpoint's
    `rope_parameters`, if its type is not "default". `interleaved`: the checkpoint rotates the pairs
    (0, 1), (2, 3) … and not (0, dim / 2), (1, dim / 2 + 1) …; its rows are put in the second order
    when they load. `backwards`: by the negative angle.
    """

    theta: float
    dim: int
    scaling: dict[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    backwards: bool = False


@dataclass(frozen=True, slots=True)
class QueryScale:
    """A factor on the query that grows with its position, for long contexts.

    log_steps   1 + beta · ln(1 + ⌊position / length⌋): Llama 4, which counts from `shift` = 1
    log_n       max(1, log_length(position + 1)): Qwen 1
    """

    kind: Literal["log_steps", "log_n"]
    length: int
    beta: float = 0.0
    shift: int = 0


@dataclass(frozen=True, slots=True)
class Attn:
    """Multi-head attention with grouped key/value heads.

    scale           multiplies the scores
    window          tokens a query sees, itself included (None: all)
    chunk           a query sees its own chunk of so many positions only (None: all)
    softcap         scores become softcap · tanh(score / softcap)
    alibi           the biases' span, 8 in the paper (Press et al. 2022); None: no biases
    alibi_factor    multiplies the biases' slopes
    sinks           one learned score a head that takes part in the softmax and has no value
    qk_norm         of q and k, before the rotation unless `norm_after_rope`
    qk_norm_over    a head, by a weight that all heads share; a head, by a weight of its own; or all
                    heads at once
    out_norm        of what the output matrix gets
    clip            q, k and v are clamped to ± clip, behind the norm and before the rotation
    packed          how the checkpoint holds q, k, v, if as one tensor (role "qkv"): all of q, k, v
                    one after the other; q, k, v of each head; the queries, k, v of each group of
                    heads; or, of four slices, q, v, k of each (CodeGen). "pairs": q is a tensor of
                    its own, k and v of each head are another (role "kv")
    values_in_keys  the values are the first so many numbers of the keys, and only the keys are in
                    the cache (None: values are their own)
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    alibi: float | None = None
    alibi_factor: float = 1.0
    sinks: bool = False
    qk_norm: Norm | None = None
    qk_norm_over: Literal["head", "own head", "all heads"] = "head"
    norm_after_rope: bool = False
    query_scale: QueryScale | None = None
    out_norm: Norm | None = None
    clip: float | None = None
    packed: Literal["no", "qkv", "heads", "groups", "slices", "pairs"] = "no"
    values_in_keys: int | None = None

    @property
    def cache_width(self) -> int:
        """Numbers that a token takes of one layer's cache."""
        return self.kv_heads * self.head_dim * (1 if self.values_in_keys else 2)


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, 2024).

    Keys and values of all heads are one latent vector a token, `latent_dim` numbers, and one
    rotated key of `rope.dim` that the heads share; only these two are in the cache. `nope_dim`: of
    a head's query and key that is not rotated. `q_rank`: of the query's own two factors (None: one
    matrix). Roles: q_a, q_a_norm, q_b or q; kv_a, kv_a_norm, kv_b; out.
    """

    heads: int
    nope_dim: int
    value_dim: int
    latent_dim: int
    q_rank: int | None
    scale: float
    rope: Rope
    norm: Norm
    query_scale: QueryScale | None = None

    @property
    def cached(self) -> Attn:
        """The attention over the latents: one key that all heads share, values within."""
        width = self.latent_dim + self.rope.dim
        return Attn(self.heads, 1, width, self.scale, values_in_keys=self.latent_dim)


@dataclass(frozen=True, slots=True)
class Mlp:
    """Feed-forward: down(act(gate) · up) where `gated`, else down(act(up)).

    `packed`: the checkpoint holds gate and up as one tensor (role "gate_up"), gate first.
    `inner_norm`: of what the last matrix gets. `limit`: of "clamped_silu", see `Moe`.
    """

    size: int
    act: Act = "silu"
    gated: bool = True
    packed: bool = False
    inner_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Moe:
    """Mixture of experts: `top_k` of `experts` feed-forwards, each gated and of `size`.

    score        of the router's logits: softmax or sigmoid over all experts; softmax over those
                 chosen; or the two rounds of SparseMixer (Liu et al. 2023) with its `jitter`
    renorm       the chosen scores are divided by their sum (plus `renorm_eps`)
    groups       (groups of experts, groups kept), and what of a group is compared: the sum of its
                 two best or its best
    scale        multiplies the weights
    on_input     the weight multiplies what an expert gets, not what it gives (Llama 4)
    bias         role "router_bias": added to the scores for the choice alone (DeepSeek-V3)
    shared       a feed-forward that every token takes (roles with "shared_" before them), gated by
                 a sigmoid of its own (role "shared_router") where `shared_gate`
    act          "clamped_silu": gate · sigmoid(1.702 · gate) · (up + 1), both clamped to `limit`
    stored       how the checkpoint holds the experts: tensors of each (role names with `{e}`); one
                 of all [E, 2 · size, C], gate first; the same turned [E, C, 2 · size]; turned with
                 gate and up in turns; or gate, up and a turned down, each [E · size, C]
    """

    experts: int
    top_k: int
    size: int
    score: Literal["softmax", "sigmoid", "softmax of chosen", "sparsemixer"] = "softmax"
    renorm: bool = True
    renorm_eps: float = 0.0
    groups: tuple[int, int] = (1, 1)
    group_score: Literal["best two", "best"] = "best two"
    scale: float = 1.0
    on_input: bool = False
    bias: bool = False
    jitter: float = 0.0
    act: Act = "silu"
    limit: float = 7.0
    shared: Mlp | None = None
    shared_gate: bool = False
    stored: Literal["each", "rows", "columns", "column pairs", "stacked"] = "each"


@dataclass(frozen=True, slots=True)
class Matmul:
    """A matrix [C, C] in the place of attention or feed-forward (Puzzle, Bercovich et al. 2024)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One block of the residual stream; None leaves a part out with its norms.

    order   sequential   x += attn(norm(x)); x += ffn(norm(x))
            parallel     x += attn(norm(x)) + ffn(norm(x)), by one norm where "pre_ffn" is absent
            post         x = norm(x + attn(x)); x = norm(x + ffn(x)), by the same roles
            normed       x = norm(x); x += attn(x); x = norm(x); x += ffn(x)
    skip    (layer, share): before all of this, `share` of what that earlier layer got and 1 - share
            of x
    """

    attn: Attn | Mla | Matmul | None
    ffn: Mlp | Moe | Matmul | None
    order: Literal["sequential", "parallel", "post", "normed"] = "sequential"
    skip: tuple[int, float] | None = None


@dataclass(frozen=True, slots=True)
class Positions:
    """Vectors added to the embedding: a learned table (role "positions") of so many rows, or sines
    (Vaswani et al. 2017). Position p takes row p + `offset`."""

    kind: Literal["learned", "sines"]
    rows: int
    offset: int = 0


class ModelShape(Protocol):
    """What memory, cache and attention need to know of a model, whether it has a spec or not."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def stretched_positions(self) -> int | None: ...

    @property
    def layers(self) -> tuple[Layer, ...]: ...

    def cached(self) -> list[Attn]:
        """What each layer that has a part of the cache computes over it, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A whole model.

    max_positions    the longest context it was made for
    stretched_positions   a longer one that it can be asked to serve, less well (None: no longer)
    names            role → checkpoint name without ".weight"; "layer" is the prefix of layer i with
                     `{i}` in it. A norm whose role is absent is not computed. "ROLE.bias": the
                     whole name of a bias that is not called as its weight is
    prefix           beginning of the names that a checkpoint saved without its head leaves out
    biases           roles that have a bias in this family; any other role may have one
    ignored          regular expressions of tensors that may be there and are not used
    embed_size       of the embedding, if not the hidden size: roles "embed_in", "embed_out" between
    embed_scale      multiplies the embedding
    residual_scale   multiplies what attention and feed-forward add
    logit_scale, logit_softcap   of the head's output, in this order
    tied_head        the head is the embedding, unless the checkpoint holds another one
    unit_head        the head's rows, or its columns, are normalised to length 1
    transposed       linear weights are stored [in, out] (Conv1D)
    """

    hidden_size: int
    vocab_size: int
    max_positions: int
    layers: tuple[Layer, ...]
    norm: Norm
    names: Tensors
    stretched_positions: int | None = None
    prefix: str = ""
    biases: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    positions: Positions | None = None
    embed_size: int | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tied_head: bool = False
    unit_head: Literal["rows", "columns"] | None = None
    transposed: bool = False

    def cached(self) -> list[Attn]:
        """What each layer that has a part of the cache computes over it, in their order."""
        found = []
        for layer in self.layers:
            if isinstance(layer.attn, Mla):
                found.append(layer.attn.cached)
            elif isinstance(layer.attn, Attn):
                found.append(layer.attn)
        return found
