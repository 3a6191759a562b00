"""The decoder: every architecture's forward, put together from layers as its spec says.

The residual stream, from tokens to logits:
    hidden = embed(tokens)
    hidden = hidden + attention(norm(hidden))      once a layer
    hidden = hidden + feed_forward(norm(hidden))
    logits = head(norm(hidden))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.attention.base import AttentionBackend, Plan
from pagedserve.attention.batch import Batch
from pagedserve.layers.attention import Attention
from pagedserve.layers.embedding import Embedding
from pagedserve.layers.mlp import FeedForward
from pagedserve.layers.norm import Normalize
from pagedserve.layers.rotary import Rotary
from pagedserve.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class Block:
    """One layer with its weights. `rotary`: which of the decoder's rotaries it uses, if any."""

    pre_attn: Normalize
    attention: Attention
    pre_ffn: Normalize
    ffn: FeedForward
    rotary: int | None


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model with its weights, all on one device and of one dtype.

    head: [vocab, C]; the embedding itself where tied. `rotaries`: the different ones of all layers.
    """

    spec: DecoderSpec
    embedding: Embedding
    blocks: tuple[Block, ...]
    rotaries: tuple[Rotary, ...]
    final_norm: Normalize
    head: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of everything between the layers."""
        return self.embedding.table.dtype

    def forward(
        self, batch: Batch, kv_layers: Sequence[Tensor], backend: AttentionBackend, plan: Plan
    ) -> Tensor:
        """Hidden states of all tokens after the final norm: [num_tokens, C].

        kv_layers: each layer's view of the cache; this step's keys and values are written there.
        """
        with torch.inference_mode():
            x = self.embedding(batch.input_ids, batch.positions)
            angles = [rotary.angles(batch.positions, x.dtype) for rotary in self.rotaries]
            for block, kv in zip(self.blocks, kv_layers, strict=True):
                x = block.attention(
                    block.pre_attn(x),
                    x,
                    angles=None if block.rotary is None else angles[block.rotary],
                    kv=kv,
                    backend=backend,
                    plan=plan,
                )
                x = block.ffn(block.pre_ffn(x), x)
            return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [n, C], rows of what `forward` returned → [n, vocab] float32."""
        with torch.inference_mode():
            return F.linear(hidden, self.head).float()

    def weight_bytes(self) -> int:
        """Bytes of all weights; a tied head is counted once."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Every weight, once."""
        found: list[Tensor | None] = [self.embedding.table, self.embedding.position_table]
        found += [self.final_norm.weight, self.final_norm.bias]
        if self.head is not self.embedding.table:
            found.append(self.head)
        for block in self.blocks:
            attention, ffn = block.attention, block.ffn
            for linear in (attention.qkv, attention.out, ffn.up, ffn.down):
                found += [linear.weight, linear.bias]
            for norm in (block.pre_attn, block.pre_ffn):
                found += [norm.weight, norm.bias]
            if attention.head_norm is not None:
                found.append(attention.head_norm.weight)
        return [tensor for tensor in found if tensor is not None]
