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
from torch import Tensor

from pagedserve.attention.base import AttentionBackend, Plan
from pagedserve.attention.batch import Batch
from pagedserve.layers.attention import Attention
from pagedserve.layers.embedding import Embedding
from pagedserve.layers.linear import Linear
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

    head: hidden to vocabulary; on the embedding's own memory where tied and not packed. `rotaries`:
    the different ones of all layers.
    """

    spec: DecoderSpec
    embedding: Embedding
    blocks: tuple[Block, ...]
    rotaries: tuple[Rotary, ...]
    final_norm: Normalize
    head: Linear

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
            return self.head(hidden).float()

    def weight_bytes(self) -> int:
        """Bytes of all weights in the forms they are held in; a tied head shares what it can."""
        linears, tensors = [self.head], [self.embedding.table, self.embedding.position_table]
        norms = [self.final_norm]
        for block in self.blocks:
            linears += [block.attention.qkv, block.attention.out, block.ffn.up, block.ffn.down]
            norms += [block.pre_attn, block.pre_ffn]
            if block.attention.head_norm is not None:
                tensors.append(block.attention.head_norm.weight)
        for norm in norms:
            tensors += norm.tensors()
        for linear in linears:
            tensors += [*linear.matrix.tensors(), linear.bias]
        held = {id(tensor): tensor.nbytes for tensor in tensors if tensor is not None}
        return sum(held.values())
