"""Attention of every kind, from a checkpoint's tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pagedserve.layers.attention import Attention, QkNorm, alibi_slopes
from pagedserve.layers.linear import Linear, Mapping
from pagedserve.layers.mla import LatentAttention, Query
from pagedserve.layers.norm import AllHeadsNorm, HeadNorm
from pagedserve.models.assembly.packing import attention_rows, halves, stored_as
from pagedserve.models.assembly.reader import Reader, Rows
from pagedserve.spec import Attn, DecoderSpec, Matmul, Mla, QueryScale, Rope

Mixer = Attention | LatentAttention | Mapping


@dataclass(frozen=True, slots=True)
class Shared:
    """What several layers have in common, once: layers know their places in these lists.

    caches: of each layer, its place among those that have a part of the cache.
    """

    ropes: list[Rope] = field(default_factory=list)
    query_scales: list[QueryScale] = field(default_factory=list)
    caches: list[int] = field(default_factory=list)


def shared_by(spec: DecoderSpec) -> Shared:
    """Collect it."""
    shared, cached = Shared(), 0
    for layer in spec.layers:
        shared.caches.append(cached)
        if not isinstance(layer.attn, Attn | Mla):
            continue
        cached += 1
        rope, scale = layer.attn.rope, layer.attn.query_scale
        if rope is not None and rope not in shared.ropes:
            shared.ropes.append(rope)
        if scale is not None and scale not in shared.query_scales:
            shared.query_scales.append(scale)
    return shared


def attention(reader: Reader, i: int, shared: Shared) -> Mixer | None:
    """Of layer i, if it has any."""
    spec = reader.spec.layers[i].attn
    if spec is None:
        return None
    hidden = reader.spec.hidden_size
    if isinstance(spec, Matmul):
        return Mapping(reader.linear({"attn_map": hidden}, hidden, i))
    scale = spec.query_scale
    place = None if scale is None else shared.query_scales.index(scale)
    if isinstance(spec, Mla):
        return latent_attention(reader, spec, i, shared, place)
    slopes = sinks = None
    if spec.alibi is not None:
        slopes = alibi_slopes(spec.heads, spec.alibi) * spec.alibi_factor
        slopes = slopes.to(reader.device.torch)
    if spec.sinks:
        sinks = reader.tensor("sinks", (spec.heads,), i, part="", dtype=torch.float32)
    width = spec.heads * spec.head_dim
    return Attention(
        spec,
        qkv=query_key_value(reader, spec, i),
        out=reader.linear({"out": hidden}, width, i),
        ops=reader.ops,
        cache=shared.caches[i],
        rotary=None if spec.rope is None else shared.ropes.index(spec.rope),
        query_scale=place,
        norm_qk=None if spec.qk_norm is None else norm_qk(reader, spec, i),
        out_norm=reader.optional_norm("out_norm", width, spec.out_norm, i),
        slopes=slopes,
        sinks=sinks,
        fused=reader.device.head_ops(reader.dtype) if in_one_kernel(spec) else None,
    )


def in_one_kernel(attn: Attn) -> bool:
    """Whether `kernels.qk_rope_kv` knows all that happens to the heads of q and k."""
    norm = attn.qk_norm
    known = norm is None or (
        norm.kind == "rms" and not norm.bare and attn.qk_norm_over != "all heads"
    )
    return known and attn.clip is None and attn.query_scale is None


def query_key_value(reader: Reader, attn: Attn, i: int) -> Linear:
    """One matrix of all three."""
    counts = {"q": attn.heads, "k": attn.kv_heads, "v": attn.kv_heads}
    parts = [
        Rows(stored_as(attn, role), heads * attn.head_dim, attention_rows(attn, role))
        for role, heads in counts.items()
    ]
    return reader.stacked(parts, reader.spec.hidden_size, i)


def norm_qk(reader: Reader, attn: Attn, i: int) -> QkNorm:
    """The norm of q and k, in our order of numbers."""
    norm, order = attn.qk_norm, halves(attn.rope, attn.head_dim)
    assert norm is not None
    if attn.qk_norm_over == "all heads":
        both = {
            role: reader.norm_of(
                role, heads * attn.head_dim, norm, i, whole_heads(order, heads, attn.head_dim)
            )
            for role, heads in (("q_norm", attn.heads), ("k_norm", attn.kv_heads))
        }
        return AllHeadsNorm(attn.heads, both["q_norm"], both["k_norm"])
    if norm.bare:
        return HeadNorm(norm, None, None)
    weights, biases = [], []
    for role, heads in (("q_norm", attn.heads), ("k_norm", attn.kv_heads)):
        weight, bias = head_weights(reader, attn, role, heads, i)
        weights.append(weight if order is None else weight[:, order])
        if bias is not None:
            biases.append(bias if order is None else bias[:, order])
    return HeadNorm(norm, torch.cat(weights), torch.cat(biases) if biases else None)


def head_weights(
    reader: Reader, attn: Attn, role: str, heads: int, i: int
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of every head's norm, [heads, D]: one for all, or one each.

    Those of each are one tensor, or so many of their own (`{h}` in the role's name).
    """
    assert attn.qk_norm is not None
    if attn.qk_norm_over == "head":
        weight, bias = reader.norm_weights(role, (attn.head_dim,), attn.qk_norm, i)
        return weight.expand(heads, -1), None if bias is None else bias.expand(heads, -1)
    if "{h}" not in reader.spec.names[role]:
        return reader.norm_weights(role, (heads, attn.head_dim), attn.qk_norm, i)
    each = [
        reader.at(h=head).norm_weights(role, (attn.head_dim,), attn.qk_norm, i)
        for head in range(heads)
    ]
    biases = [bias for _, bias in each if bias is not None]
    return torch.stack([weight for weight, _ in each]), torch.stack(biases) if biases else None


def whole_heads(order: Tensor | None, heads: int, head_dim: int) -> Tensor | None:
    """The order of one head's numbers, for all heads one after the other."""
    if order is None:
        return None
    return (torch.arange(heads)[:, None] * head_dim + order).reshape(-1)


def latent_attention(
    reader: Reader, mla: Mla, i: int, shared: Shared, query_scale: int | None
) -> LatentAttention:
    """Its rotated numbers in our order, and kv_b split into what keys and what values get."""
    hidden, per_head = reader.spec.hidden_size, mla.nope_dim + mla.rope.dim
    order = halves(mla.rope, mla.rope.dim)
    q_rows = kv_rows = None
    if order is not None:
        one = torch.cat((torch.arange(mla.nope_dim), mla.nope_dim + order))
        q_rows = whole_heads(one, mla.heads, per_head)
        kv_rows = torch.cat((torch.arange(mla.latent_dim), mla.latent_dim + order))
    width = mla.heads * per_head
    if mla.q_rank is None:
        query = Query(None, None, reader.stacked([Rows("q", width, q_rows)], hidden, i))
    else:
        query = Query(
            reader.linear({"q_a": mla.q_rank}, hidden, i),
            reader.norm_of("q_a_norm", mla.q_rank, mla.norm, i),
            reader.stacked([Rows("q_b", width, q_rows)], mla.q_rank, i),
        )
    kv_width = mla.latent_dim + mla.rope.dim
    both = (mla.heads, mla.nope_dim + mla.value_dim, mla.latent_dim)
    kv_b = reader.tensor("kv_b", (both[0] * both[1], both[2]), i).view(both)
    key_up, value_up = kv_b.split_with_sizes((mla.nope_dim, mla.value_dim), 1)
    return LatentAttention(
        mla,
        cached=mla.cached,
        query=query,
        kv=reader.stacked([Rows("kv_a", kv_width, kv_rows)], hidden, i),
        kv_norm=reader.norm_of("kv_a_norm", mla.latent_dim, mla.norm, i),
        key_up=key_up.contiguous(),
        value_up=value_up.transpose(1, 2).contiguous(),
        out=reader.linear({"out": hidden}, mla.heads * mla.value_dim, i),
        ops=reader.ops,
        cache=shared.caches[i],
        rotary=shared.ropes.index(mla.rope),
        query_scale=query_scale,
    )
