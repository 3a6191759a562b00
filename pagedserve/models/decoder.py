"""The decoder: every architecture's forward, put together from layers as its spec says.

The residual stream, from tokens to logits:
    hidden = embed(tokens)
    hidden = hidden + attention(norm(hidden))      once a layer, in one of four orders
    hidden = hidden + feed_forward(norm(hidden))
    logits = head(norm(hidden))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pagedserve.attention.base import AttentionBackend, Plan
from pagedserve.attention.batch import Batch
from pagedserve.kernels.experts import LoopedExperts
from pagedserve.layers.embedding import Embedding
from pagedserve.layers.forward import Forward
from pagedserve.layers.linear import Linear
from pagedserve.layers.norm import Normalize, normed
from pagedserve.layers.rotary import Rotary, query_scale
from pagedserve.spec import DecoderSpec, Layer, QueryScale


class Part(Protocol):
    """Attention or feed-forward of any kind."""

    def __call__(
        self, x: Tensor, residual: Tensor | None, forward: Forward, norm: Normalize | None = None
    ) -> Tensor:
        """x, residual: [T, C] → residual + what it makes of norm(x); that alone without one."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """One layer with its weights; None for what it does not have. See `spec.Layer`."""

    order: Literal["sequential", "parallel", "post", "normed"]
    pre_attn: Normalize | None
    attention: Part | None
    post_attn: Normalize | None
    pre_ffn: Normalize | None
    ffn: Part | None
    post_ffn: Normalize | None
    residual_scale: float
    skip: tuple[int, float] | None = None

    def __call__(self, x: Tensor, forward: Forward) -> Tensor:
        """x: [T, C] → the same."""
        if self.order == "parallel":
            return self.in_parallel(x, forward)
        if self.order == "post":
            for part, norm in ((self.attention, self.pre_attn), (self.ffn, self.pre_ffn)):
                x = normed(norm, self.add(part, x, x, None, forward))
            return x
        if self.order == "normed":
            x = normed(self.pre_attn, x)
            x = self.add(self.attention, x, x, self.post_attn, forward)
            x = normed(self.pre_ffn, x)
            return self.add(self.ffn, x, x, self.post_ffn, forward)
        x = self.add(self.attention, x, x, self.post_attn, forward, self.pre_attn)
        return self.add(self.ffn, x, x, self.post_ffn, forward, self.pre_ffn)

    def in_parallel(self, x: Tensor, forward: Forward) -> Tensor:
        """Both parts read the same residual."""
        h = normed(self.pre_attn, x)
        own = h if self.pre_ffn is None else self.pre_ffn(x)
        x = self.add(self.attention, h, x, self.post_attn, forward)
        return self.add(self.ffn, own, x, self.post_ffn, forward)

    def add(
        self,
        part: Part | None,
        h: Tensor,
        x: Tensor,
        post: Normalize | None,
        forward: Forward,
        pre: Normalize | None = None,
    ) -> Tensor:
        """x + scale · post(part(pre(h))); in one go where there is neither scale nor post."""
        if part is None:
            return x
        if post is None and self.residual_scale == 1.0:
            return part(h, x, forward, pre)
        return x + normed(post, part(h, None, forward, pre)) * self.residual_scale


@dataclass(frozen=True, slots=True)
class Head:
    """linear: hidden to vocabulary; on the embedding's own memory where tied and not packed.

    `narrow`: before it, where the embedding is of another size.
    """

    linear: Linear
    narrow: Linear | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden: [n, C] → [n, vocab], float32 where something is done to the logits."""
        if self.narrow is not None:
            hidden = self.narrow(hidden)
        logits = self.linear(hidden)
        if self.scale != 1.0 or self.softcap is not None:
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model with its weights, all on one device.

    `rotaries`, `query_scales`: the different ones of all layers. `dtype`: of the weights and of
    everything between the layers.
    """

    spec: DecoderSpec
    embedding: Embedding
    blocks: tuple[Block, ...]
    rotaries: tuple[Rotary, ...]
    query_scales: tuple[QueryScale, ...]
    final_norm: Normalize | None
    head: Head
    dtype: torch.dtype

    def forward(
        self, batch: Batch, kv_layers: Sequence[Tensor], backend: AttentionBackend, plan: Plan
    ) -> Tensor:
        """Hidden states of all tokens after the final norm: [num_tokens, C].

        kv_layers: each caching layer's view of the cache; this step's keys and values are written
        there.
        """
        with torch.inference_mode():
            x = self.embedding(batch.input_ids, batch.positions)
            angles = [rotary.angles(batch.positions, x.dtype) for rotary in self.rotaries]
            scales = [query_scale(each, batch.positions, x.dtype) for each in self.query_scales]
            forward = Forward(kv_layers, backend, plan, angles, scales, batch.slot_mapping)
            x = self.through(x, forward)
            return normed(self.final_norm, x)

    def through(self, x: Tensor, forward: Forward) -> Tensor:
        """All blocks, the earlier layers that a later one asks for kept until then. x: [T, C]."""
        kept: dict[int, Tensor] = {}
        wanted = {block.skip[0] for block in self.blocks if block.skip is not None}
        for i, block in enumerate(self.blocks):
            if i in wanted:
                kept[i] = x.clone()  # blocks write over what they get
            if block.skip is not None:
                layer, share = block.skip
                x = share * kept[layer] + (1 - share) * x
            x = block(x, forward)
        return x

    def head_logits(self, hidden: Tensor) -> Tensor:
        """The same as `logits`, in the model's own dtype where nothing is done to them."""
        with torch.inference_mode():
            return self.head(hidden)

    @property
    def capturable(self) -> bool:
        """Whether `forward` only enqueues: no shape or choice depends on numbers on the device."""
        return not any(isinstance(each, LoopedExperts) for each in parts(self.blocks))

    def excerpt(self) -> Decoder:
        """With one layer of each kind: it asks of a device what the whole one does, less often."""
        if any(block.skip is not None for block in self.blocks):  # they know layers by number
            return self
        kinds: list[Layer] = []
        blocks: list[Block] = []
        for layer, block in zip(self.spec.layers, self.blocks, strict=True):
            if layer not in kinds:
                kinds.append(layer)
                blocks.append(block)
        return dataclasses.replace(self, blocks=tuple(blocks))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [n, C], rows of what `forward` returned → [n, vocab] float32."""
        return self.head_logits(hidden).float()

    def weight_bytes(self) -> int:
        """Bytes of all weights in the forms they are held in; a tied head shares what it can."""
        held = {id(tensor): tensor.nbytes for tensor in tensors(self)}
        return sum(held.values())


def tensors(held: Any) -> Iterator[Tensor]:
    """Every tensor in a tree of dataclasses and tuples; matrices know their own."""
    for part in parts(held):
        if isinstance(part, Tensor):
            yield part
        elif hasattr(part, "tensors"):
            yield from part.tensors()


def parts(held: Any) -> Iterator[Any]:
    """Everything in a tree of dataclasses and tuples, down to tensors and matrices."""
    yield held
    if isinstance(held, tuple):
        for part in held:
            yield from parts(part)
    elif dataclasses.is_dataclass(held) and not hasattr(held, "tensors"):
        for each in dataclasses.fields(held):
            yield from parts(getattr(held, each.name))
