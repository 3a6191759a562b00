"""From a spec and a source of weights to a decoder.

The rooms that know which of a checkpoint's tensors become which of ours:

    reader        one tensor, norm or matrix by its role
    attention     q, k, v stacked into one matrix, whatever they were packed as
    feed_forward  gate and up stacked, experts gathered
    packing       which rows of a packed tensor are whose
"""

from __future__ import annotations

import torch

from pagedserve.device import Device
from pagedserve.layers.embedding import Embedding, sines
from pagedserve.layers.linear import Linear
from pagedserve.layers.rotary import Rotary
from pagedserve.models.assembly.attention import Shared, attention, shared_by
from pagedserve.models.assembly.feed_forward import feed_forward
from pagedserve.models.assembly.reader import Reader
from pagedserve.models.decoder import Block, Decoder, Head
from pagedserve.models.weights import Source
from pagedserve.spec import DecoderSpec


def assemble(
    spec: DecoderSpec,
    source: Source,
    *,
    device: Device,
    dtype: torch.dtype,
    context: int | None = None,
) -> Decoder:
    """Read every weight of `spec` into `dtype` on `device`, for contexts of up to `context` tokens.

    Raises StartupError naming the tensors that are missing, left over or of the wrong shape.
    """
    reader = Reader(spec, source, device, dtype)
    shared = shared_by(spec)
    embedding = embed(reader)
    blocks = tuple(block(reader, i, shared) for i in range(len(spec.layers)))
    final_norm = reader.norm("final_norm")
    head = read_head(reader, embedding)
    source.finish()
    length = context or spec.max_positions
    rotaries = tuple(Rotary(rope, reader.ops, device.torch, length) for rope in shared.ropes)
    return Decoder(
        spec, embedding, blocks, rotaries, tuple(shared.query_scales), final_norm, head, dtype
    )


def embed(reader: Reader) -> Embedding:
    """The embedding, and what follows it before the first block."""
    spec = reader.spec
    size = spec.embed_size or spec.hidden_size
    table = reader.tensor("embed", (spec.vocab_size, size))
    widen = None
    if "embed_in" in spec.names:
        widen = reader.linear({"embed_in": spec.hidden_size}, size)
    positions = None
    if spec.positions is not None:
        shape = (spec.positions.rows, spec.hidden_size)
        if spec.positions.kind == "learned":
            positions = reader.tensor("positions", shape)
        else:
            positions = sines(*shape).to(reader.dtype).to(reader.device.torch)
    offset = spec.positions.offset if spec.positions is not None else 0
    norm = reader.norm("embed_norm")
    scale = float(torch.tensor(spec.embed_scale, dtype=reader.dtype))
    return Embedding(table, scale, widen, positions, offset, norm, reader.ops)


def block(reader: Reader, i: int, shared: Shared) -> Block:
    """Layer i."""
    layer = reader.spec.layers[i]
    parts = (layer.attn is not None, layer.ffn is not None)
    return Block(
        order=layer.order,
        pre_attn=reader.norm("pre_attn", i) if parts[0] else None,
        attention=attention(reader, i, shared),
        post_attn=reader.norm("post_attn", i) if parts[0] else None,
        pre_ffn=reader.norm("pre_ffn", i) if parts[1] else None,
        ffn=feed_forward(reader, i),
        post_ffn=reader.norm("post_ffn", i) if parts[1] else None,
        residual_scale=reader.spec.residual_scale,
        skip=layer.skip,
    )


def read_head(reader: Reader, embedding: Embedding) -> Head:
    """The output matrix. A tied one is the embedding, which a checkpoint may hold twice."""
    spec, table = reader.spec, embedding.table
    narrow = None
    if "embed_out" in spec.names:
        narrow = reader.linear({"embed_out": table.shape[1]}, spec.hidden_size)
    weight = table
    if not spec.tied_head or reader.has("head"):
        weight = reader.tensor("head", tuple(table.shape))
        if spec.tied_head and torch.equal(weight, table):
            weight = table
    if spec.unit_head is not None:
        dim = 1 if spec.unit_head == "rows" else 0
        weight = torch.nn.functional.normalize(weight.float(), dim=dim).to(weight.dtype)
    bias = None
    if reader.has_bias("head"):
        bias = reader.tensor("head", (spec.vocab_size,), part="bias")
    linear = Linear.of(weight, bias, reader.device)
    return Head(linear, narrow, spec.logit_scale, spec.logit_softcap)
