"""From a spec and a source of weights to a decoder.

The one place that knows which of a checkpoint's tensors become which of ours: q, k, v are stacked
into one matrix, gate and up into another, Conv1D matrices are turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedserve.device import Device
from pagedserve.kernels.ops import Ops
from pagedserve.layers.attention import Attention
from pagedserve.layers.embedding import Embedding
from pagedserve.layers.linear import Linear
from pagedserve.layers.mlp import FeedForward
from pagedserve.layers.norm import HeadNormalize, Normalize, normalize
from pagedserve.layers.rotary import Rotary
from pagedserve.models.decoder import Block, Decoder
from pagedserve.models.weights import Source
from pagedserve.spec import Attn, DecoderSpec, Mlp, Norm, Rope


def assemble(spec: DecoderSpec, source: Source, *, device: Device, dtype: torch.dtype) -> Decoder:
    """Read every weight of `spec` into `dtype` on `device`.

    Raises StartupError naming the tensors that are missing, left over or of the wrong shape.
    """
    return Assembly(spec, source, device, dtype).decoder()


@dataclass(frozen=True, slots=True)
class Assembly:
    """What the parts below share. Roles are those of `DecoderSpec.names`."""

    spec: DecoderSpec
    source: Source
    device: Device
    dtype: torch.dtype

    @property
    def ops(self) -> Ops:
        return self.device.ops(self.dtype)

    def decoder(self) -> Decoder:
        spec = self.spec
        ropes: list[Rope] = []
        for layer in spec.layers:
            if layer.attn.rope is not None and layer.attn.rope not in ropes:
                ropes.append(layer.attn.rope)
        rotaries = tuple(Rotary(rope, self.device.torch) for rope in ropes)
        embedding = self.embedding()
        blocks = tuple(self.block(i, ropes) for i in range(len(spec.layers)))
        final_norm = self.norm("final_norm")
        head = Linear.of(self.head(embedding.table), None, self.device)
        self.source.finish()
        return Decoder(spec, embedding, blocks, rotaries, final_norm, head)

    def embedding(self) -> Embedding:
        table = self.tensor("embed", (self.spec.vocab_size, self.spec.hidden_size))
        if not self.spec.learned_positions:
            return Embedding(table)
        positions = (self.spec.learned_positions, self.spec.hidden_size)
        return Embedding(table, self.tensor("positions", positions))

    def head(self, embedding: Tensor) -> Tensor:
        """The output matrix. A tied one is the embedding, which a checkpoint may hold twice."""
        if self.spec.tied_head and not self.source.has(self.name("head") + ".weight"):
            return embedding
        head = self.tensor("head", tuple(embedding.shape))
        return embedding if self.spec.tied_head and torch.equal(head, embedding) else head

    def block(self, i: int, ropes: list[Rope]) -> Block:
        layer = self.spec.layers[i]
        rope = layer.attn.rope
        return Block(
            pre_attn=self.norm("pre_attn", i),
            attention=self.attention(layer.attn, i),
            pre_ffn=self.norm("pre_ffn", i),
            ffn=self.feed_forward(layer.ffn, i),
            rotary=None if rope is None else ropes.index(rope),
        )

    def attention(self, attn: Attn, i: int) -> Attention:
        hidden = self.spec.hidden_size
        q, kv = attn.heads * attn.head_dim, attn.kv_heads * attn.head_dim
        if attn.packed:
            qkv = self.linear({"qkv": q + 2 * kv}, hidden, i)
        else:
            qkv = self.linear({"q": q, "k": kv, "v": kv}, hidden, i)
        norm = self.head_norm(attn, attn.qk_norm, i) if attn.qk_norm else None
        return Attention(attn, qkv, self.linear({"out": hidden}, q, i), self.ops, norm)

    def head_norm(self, attn: Attn, norm: Norm, i: int) -> HeadNormalize:
        q, k = (self.tensor(role, (attn.head_dim,), i) for role in ("q_norm", "k_norm"))
        rows = (q.expand(attn.heads, -1), k.expand(attn.kv_heads, -1))
        return HeadNormalize(norm.eps, torch.cat(rows))

    def feed_forward(self, ffn: Mlp, i: int) -> FeedForward:
        up = {"gate": ffn.size, "up": ffn.size} if ffn.gated else {"up": ffn.size}
        hidden = self.spec.hidden_size
        return FeedForward.of(
            ffn, self.linear(up, hidden, i), self.linear({"down": hidden}, ffn.size, i), self.ops
        )

    def norm(self, role: str, i: int | None = None) -> Normalize:
        shape = (self.spec.hidden_size,)
        has_bias = self.spec.norm.kind == "layer" and self.has_bias(role, i)
        bias = self.tensor(role, shape, i, part="bias") if has_bias else None
        return normalize(self.spec.norm, self.tensor(role, shape, i), bias, self.ops)

    def linear(self, rows: dict[str, int], columns: int, i: int) -> Linear:
        """The matrices of several roles stacked; `rows`: how many output rows each has."""
        total = sum(rows.values())
        weight = torch.empty((total, columns), dtype=self.dtype, device=self.device.torch)
        biased = [role for role in rows if self.has_bias(role, i)]
        bias = torch.zeros(total, dtype=self.dtype, device=self.device.torch) if biased else None
        start = 0
        for role, count in rows.items():
            part = slice(start, start + count)
            self.source.read(
                f"{self.name(role, i)}.weight", weight[part], transposed=self.spec.transposed
            )
            if bias is not None and role in biased:
                self.source.read(f"{self.name(role, i)}.bias", bias[part])
            start += count
        return Linear.of(weight, bias, self.device)

    def tensor(
        self, role: str, shape: Sequence[int], i: int | None = None, *, part: str = "weight"
    ) -> Tensor:
        """One tensor of its own."""
        into = torch.empty(tuple(shape), dtype=self.dtype, device=self.device.torch)
        self.source.read(f"{self.name(role, i)}.{part}", into)
        return into

    def has_bias(self, role: str, i: int | None) -> bool:
        return role in self.spec.biases or self.source.has(f"{self.name(role, i)}.bias")

    def name(self, role: str, i: int | None = None) -> str:
        prefix = "" if i is None else self.spec.names["layer"].format(i=i)
        return prefix + self.spec.names[role]
