"""Our attention, as transformers' models call it: over the paged cache, or only to be looked at.

A model that declares attention-backend support asks a registry for the function by a name, and
hands every keyword argument of its own call down to it. Two names are registered here.

    PAGED   computes. No mask function goes with it, so that no mask is built: which keys a query
            sees stands in the layer's `Attn`
    PROBE   computes nothing, records how it is called. The mask function that goes with it makes no
            mask but says which one was asked for
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pagedserve.attention.base import AttentionBackend, Plan
from pagedserve.spec import Attn

PAGED, PROBE = "pagedserve", "pagedserve_probe"

OWN_MASK = "it makes an attention mask of its own"
# Keyword arguments of an attention call that say nothing about what is to be computed: either as
# the eager implementation of every class ignores them, or as their effect is the mask's.
HARMLESS = frozenset(
    (
        "position_ids",
        "cache_position",
        "sliding_window",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "num_items_in_batch",
        "is_causal",
        "layer_idx",
        "deterministic",
        "input_ids",
        "dropout",
        "position_embeddings",
    )
)


class NotExpressible(Exception):
    """What a model asks of attention that ours cannot do; the message ends a sentence."""


class NumbersNeeded(Exception):
    """What a model asks for depends on numbers, and there are only shapes."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Which mask a model asked for. `problem`: why it is none of ours.

    No tensor: a model that takes it for one would make another mask of it.
    """

    window: int | None = None
    chunk: int | None = None
    problem: str | None = None

    def __getattr__(self, name: str) -> Any:
        raise NotExpressible(OWN_MASK)

    def __getitem__(self, index: Any) -> Mask:
        parts = index if isinstance(index, tuple) else (index,)
        if any(part not in (slice(None), slice(0, None), ...) for part in parts):
            raise NotExpressible(OWN_MASK)
        return self


@dataclass(slots=True)
class Recorder:
    """Filled by one forward under PROBE: what each attention call asks for, in their order."""

    layers: list[Attn] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)


@dataclass(slots=True)
class PagedCalls:
    """One forward under PAGED: the n-th attention call is the n-th layer of the cache."""

    layers: Sequence[Attn]
    modules: Sequence[nn.Module]
    kv: Sequence[Tensor]
    backend: AttentionBackend
    plan: Plan
    dtype: torch.dtype
    count: int = 0

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """q: [1, H, T, D]; k: [1, K, T, D]; v: [1, K, T, E] → [1, T, H, E]."""
        at, self.count = self.count, self.count + 1
        assert at < len(self.layers) and module is self.modules[at], "attention out of order"
        attn, width = self.layers[at], v.shape[-1]
        out = self.backend.forward(
            self.tokens(q, attn.head_dim),
            self.tokens(k, attn.head_dim),
            self.tokens(v, attn.head_dim),
            self.kv[at],
            self.plan,
            attn,
            sinks=None if sinks is None else sinks.float(),
        )
        return out[None, :, :, :width].to(q.dtype)

    def tokens(self, x: Tensor, head_dim: int) -> Tensor:
        """[1, H, T, D] → [T, H, head_dim] contiguous; what is added to a head are zeros, which
        change neither its product with another nor the part of a sum that is kept."""
        x = x[0].transpose(0, 1).to(self.dtype)
        return F.pad(x, (0, head_dim - x.shape[-1])) if x.shape[-1] < head_dim else x.contiguous()


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    paged: PagedCalls,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' contract: see `PagedCalls.attend`. What is ignored here was probed."""
    assert attention_mask is None, "a mask was built"
    return paged.attend(module, query, key, value, s_aux), None


def record_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    paged: Recorder | None = None,
    **said: Any,
) -> tuple[Tensor, None]:
    """transformers' contract, for `Recorder`. Raises NotExpressible."""
    if paged is None:
        raise NotExpressible("it does not hand its keyword arguments down to attention")
    paged.layers.append(read_call(module, query, key, value, attention_mask, said))
    paged.modules.append(module)
    return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[-1])), None


def read_call(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, said: dict[str, Any]
) -> Attn:
    """What one attention call asks for. Raises NotExpressible."""
    scaling, softcap, sinks = (said.pop(key, None) for key in ("scaling", "softcap", "s_aux"))
    if q.dim() != 4 or q.shape[0] != 1 or k.shape[:3] != v.shape[:3]:
        raise NotExpressible(f"queries {tuple(q.shape)}, keys {tuple(k.shape)}")
    if k.shape[2] != q.shape[2]:
        raise NotExpressible(f"{q.shape[2]} queries over {k.shape[2]} keys of its own keeping")
    if isinstance(mask, Tensor):
        raise NotExpressible(OWN_MASK)
    causal = said.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if mask is None and not causal:
        raise NotExpressible("its attention is not causal")
    if mask is not None and not isinstance(mask, Mask):
        raise NotExpressible(f"its attention mask is a {type(mask).__name__}")
    if mask is not None and mask.problem:
        raise NotExpressible(mask.problem)
    if scaling is not None and not isinstance(scaling, int | float):
        raise NotExpressible("the scale of its scores is not a number")
    for key, value in said.items():
        if value is not None and value is not False and key not in HARMLESS:
            raise NotExpressible(f"its attention takes {key}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise NotExpressible(f"attention sinks {tuple(sinks.shape)} for {heads} heads")
    return Attn(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=max(q.shape[-1], v.shape[-1]),
        scale=float(scaling if scaling is not None else q.shape[-1] ** -0.5),
        window=None if mask is None else mask.window,
        chunk=None if mask is None else mask.chunk,
        softcap=float(softcap) if softcap else None,
        sinks=sinks is not None,
    )


def read_mask(
    *,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    **ignored: Any,
) -> Mask:
    """transformers' contract of a mask function: which of our masks `mask_function` is.

    It tells of indices (batch, head, query, key) whether the query sees the key, and is asked
    around every place where the masks that we know differ.
    """
    near = [0, 1, 2, 3, 5, 8, 13, 24, 700]
    if local_size:
        near += [n * local_size + d for n in (1, 2, 3) for d in (-1, 0, 1)]
    at = torch.tensor(sorted({n for n in near if n >= 0}), device="cpu")
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    queries, keys = at[:, None], at[None]
    distance = queries - keys
    causal = distance >= 0
    known = {Mask(): causal}
    if local_size:
        known[Mask(window=local_size)] = causal & (distance < local_size)
        known[Mask(chunk=local_size)] = causal & (queries // local_size == keys // local_size)
    try:
        seen = mask_function(zero, zero, queries, keys)
    except IndexError:
        return Mask(problem="its mask depends on more than positions")
    except RuntimeError as error:  # what a meta tensor says when it is asked for a number
        raise NumbersNeeded("a mask") from error
    seen = torch.as_tensor(seen, device="cpu").broadcast_to(causal.shape)
    for mask, expected in known.items():
        if torch.equal(seen, expected):
            return mask
    if bool(seen.all()):
        return Mask(problem="its attention is not causal")
    return Mask(problem="its mask is neither causal, a sliding window, nor chunks")


def register() -> None:
    """Make both names known to transformers; as often as one likes."""
    ALL_ATTENTION_FUNCTIONS.register(PAGED, paged_attention)
    ALL_ATTENTION_FUNCTIONS.register(PROBE, record_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, read_mask)
