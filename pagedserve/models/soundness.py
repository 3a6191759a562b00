"""Whether a spec's numbers are numbers, and fit together.

A config.json whose values are all of the right type can still describe no model: heads that do not
share, more chosen experts than there are. It is refused here, before anything is read or computed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from pagedserve.errors import StartupError
from pagedserve.spec import Attn, DecoderSpec, Mla, Moe, Norm, Rope

MAY_BE_ZERO = ("offset", "shift")
SAID_BELOW = ("window", "chunk", "top_k")  # with what they are compared to


def check_spec(spec: DecoderSpec, where: str) -> None:
    """Raise StartupError, beginning with `where`, for the first thing that does not fit."""
    for problem in problems(spec):
        raise StartupError(f"{where}: {problem}")


def problems(spec: DecoderSpec) -> Iterator[str]:
    """What is wrong, in words with the numbers in them."""
    yield from of_fields(spec)
    yield from of_norm(spec.norm)
    yield from of_cap(spec.logit_softcap, "logits")
    for layer in spec.layers:
        for part in (layer.attn, layer.ffn):
            yield from () if part is None else of_fields(part)
        if isinstance(layer.attn, Attn):
            yield from of_attention(layer.attn)
        elif isinstance(layer.attn, Mla):
            yield from of_rope(layer.attn.rope, layer.attn.rope.dim)
        if isinstance(layer.ffn, Moe):
            yield from of_experts(layer.ffn)


def of_fields(part: Any) -> Iterator[str]:
    """Sizes are positive integers, factors numbers, in `part` and in what it is made of."""
    for field in fields(part):
        value, kind = getattr(part, field.name), str(field.type).removesuffix(" | None")
        name = f"{field.name} of its {type(part).__name__}"
        if is_dataclass(value):
            yield from of_fields(value)
        elif value is None and kind != field.type:
            continue
        elif kind == "int" and field.name not in SAID_BELOW:
            low = 0 if field.name in MAY_BE_ZERO else 1
            if type(value) is not int or value < low:
                yield f"{name} must be an integer from {low} on, got {value!r:.64}"
        elif kind == "float" and not is_number(value):
            yield f"{name} must be a number, got {value!r:.64}"
        elif kind == "tuple[int, int]" and not all(type(each) is int for each in value):
            yield f"{name} must be integers, got {value!r:.64}"


def is_number(value: Any) -> bool:
    """A finite one. The root of a negative number is complex in Python, and no error."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN


def of_attention(attn: Attn) -> Iterator[str]:
    """Heads that share, an even rotation, and something to see."""
    if attn.heads % attn.kv_heads:
        yield f"{attn.heads} attention heads do not divide among {attn.kv_heads} key/value heads"
    yield from of_cap(attn.softcap, "attention scores")
    if attn.rope is not None:
        yield from of_rope(attn.rope, attn.head_dim)
    for what, tokens in (("a sliding window", attn.window), ("a chunk", attn.chunk)):
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            yield f"{what} must be of at least 1 token, got {tokens!r:.64}; null is none"
    if attn.qk_norm is not None:
        yield from of_norm(attn.qk_norm)


def of_rope(rope: Rope, head_dim: int) -> Iterator[str]:
    """Numbers are rotated in pairs, and no more of them than there are."""
    if rope.dim % 2 or not 0 < rope.dim <= head_dim:
        yield (
            f"rotary embedding turns {rope.dim} of the {head_dim} numbers of a head; it must be an "
            f"even number from 2 to {head_dim}"
        )
    if not rope.theta > 0:
        yield f"the base of the rotary embedding must be positive, got {rope.theta}"


def of_experts(moe: Moe) -> Iterator[str]:
    """Groups of one size, and enough experts in those that are kept."""
    groups, kept = moe.groups
    if groups < 1 or moe.experts % groups:
        yield f"{moe.experts} experts do not divide into {groups} groups"
        return
    if not 0 < kept <= groups:
        yield f"{kept} of {groups} groups of experts cannot be kept"
    size = moe.experts // groups
    if groups > 1 and moe.group_score == "best two" and size < 2:
        yield f"groups are compared by their two best experts, but {groups} groups have {size} each"
    if type(moe.top_k) is not int or not 0 < moe.top_k <= kept * size:
        among = f" in the {kept} groups that are kept" if groups > 1 else ""
        yield f"a token cannot choose {moe.top_k!r:.64} of {kept * size} experts{among}"


def of_norm(norm: Norm) -> Iterator[str]:
    """A root has to be taken."""
    if norm.eps < 0:
        yield f"the epsilon of a norm must not be negative, got {norm.eps}"


def of_cap(cap: float | None, what: str) -> Iterator[str]:
    """It divides."""
    if cap is not None and not cap > 0:
        yield f"the soft cap of {what} must be positive, got {cap}; null is none"
