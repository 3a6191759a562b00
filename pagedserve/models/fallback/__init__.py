"""Any other causal LM of transformers: its own modeling code, our attention over our paged cache.

    config.json ─▶ class ─▶ trace on meta ─▶ weights ─▶ trace ─▶ check
                   └───────── refused, with the reason ─────────────┘

For classes that declare attention-backend support. One batch is one flat sequence to the model;
which of its tokens belong together only our attention knows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pagedserve.attention.base import AttentionBackend, Plan
from pagedserve.attention.batch import Batch
from pagedserve.models.fallback.attention import PagedCalls
from pagedserve.models.fallback.probe import Traced, body
from pagedserve.spec import Attn, Layer, Mlp


@dataclass(frozen=True, slots=True)
class FallbackSpec:
    """What memory, cache and attention need to know of a model without a spec; see `DecoderSpec`.

    `name`: its class. `ffn_size`: of the widest feed-forward, experts of a token counted together.
    """

    name: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    attention: tuple[Attn, ...]
    ffn_size: int
    stretched_positions: int | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer, with the widest feed-forward."""
        return tuple(Layer(attn, Mlp(self.ffn_size)) for attn in self.attention)

    def cached(self) -> list[Attn]:
        """What each layer computes over its part of the cache, in their order."""
        return list(self.attention)


class Given(nn.Module):
    """Stands in the place of a body: gives the hidden states that it is handed.

    `kind`: what the body returns, so that the head behind it finds the fields it looks for.
    """

    def __init__(self, body: nn.Module, kind: type):
        super().__init__()
        self.__dict__["replaced"] = body  # no submodule: the weights are the model's
        self.kind = kind
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.hidden is not None, "no hidden states were given"
        return self.kind(last_hidden_state=self.hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["replaced"], name)


class Fallback:
    """A transformers model with its weights, whose attention function is PAGED.

    `capturable`: never, as nobody knows what a class asks of the host.
    """

    capturable = False

    def excerpt(self) -> Fallback:
        """Itself: nobody knows which layers are alike."""
        return self

    def __init__(self, model: Any, spec: FallbackSpec, traced: Traced, dtype: torch.dtype):
        self.model = model.requires_grad_(False)
        self.spec = spec
        self.dtype = dtype
        self.modules = traced.modules
        self.body = body(model)
        self.given = Given(self.body, traced.kind)
        self.head = copy.copy(model)  # the same weights behind another body
        self.head._modules = {
            name: self.given if module is self.body else module
            for name, module in model._modules.items()
        }

    def forward(
        self, batch: Batch, kv_layers: Sequence[Tensor], backend: AttentionBackend, plan: Plan
    ) -> Tensor:
        """See `base.Model`."""
        calls = PagedCalls(self.spec.attention, self.modules, kv_layers, backend, plan, self.dtype)
        with torch.inference_mode():
            out = self.body(
                input_ids=batch.input_ids.long()[None],
                position_ids=batch.positions.long()[None],
                use_cache=False,
                paged=calls,
            )
        assert calls.count == len(self.modules), "a layer's attention was left out"
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """See `base.Model`."""
        return self.head_logits(hidden).float()

    def head_logits(self, hidden: Tensor) -> Tensor:
        """See `base.Model`. The class's own forward, from behind its body on."""
        self.given.hidden = hidden[None]
        ids = torch.zeros((1, hidden.shape[0]), dtype=torch.int64, device=hidden.device)
        with torch.inference_mode():
            logits: Tensor = self.head(input_ids=ids, use_cache=False).logits[0]
        self.given.hidden = None
        return logits

    def weight_bytes(self) -> int:
        """See `base.Model`."""
        held = [*self.model.parameters(), *self.model.buffers()]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())
