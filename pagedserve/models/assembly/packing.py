"""Which rows of a checkpoint's attention tensors are whose, and in what order we want them.

We hold q, k and v as one matrix, head after head, and rotate the first half of a head's rotated
numbers against the second. Checkpoints differ in both; the difference is an order of rows, undone
once when they load. Scores do not change, since q and k are reordered alike.

H query heads · K key/value heads · G = H / K · D head_dim · R rotated
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagedserve.spec import Attn, Rope

SLICES = 4  # CodeGen was trained on so many devices and stored that way


def stored_as(attn: Attn, role: str) -> str:
    """The role of the tensor that holds `role` (q, k or v)."""
    if attn.packed == "no" or (attn.packed == "pairs" and role == "q"):
        return role
    return "kv" if attn.packed == "pairs" else "qkv"


def packed_rows(attn: Attn) -> dict[str, Tensor]:
    """Rows of q, k and v in the tensors that hold them (`stored_as`), each [heads, D] int64."""
    h, k, d = attn.heads, attn.kv_heads, attn.head_dim
    if attn.packed == "pairs":
        of_pair = torch.arange(2 * k * d).view(k, 2, d)
        return {"q": torch.arange(h * d).view(h, d), "k": of_pair[:, 0], "v": of_pair[:, 1]}
    if attn.packed == "heads":
        of_head = torch.arange(3 * h * d).view(h, 3, d)
        return {"q": of_head[:, 0], "k": of_head[:, 1], "v": of_head[:, 2]}
    if attn.packed == "groups":
        of_group = torch.arange((h + 2 * k) * d).view(k, h // k + 2, d)
        q = of_group[:, :-2].reshape(h, d)
        return {"q": q, "k": of_group[:, -2], "v": of_group[:, -1]}
    if attn.packed == "slices":
        of_slice = torch.arange(3 * h * d).view(SLICES, 3, h // SLICES, d)
        q, v, keys = (of_slice[:, part].reshape(h, d) for part in range(3))
        return {"q": q, "k": keys, "v": v}
    rows = torch.arange((h + 2 * k) * d).view(h + 2 * k, d)
    return {"q": rows[:h], "k": rows[h : h + k], "v": rows[h + k :]}


def halves(rope: Rope | None, head_dim: int) -> Tensor | None:
    """Order of a head's numbers that turns rotated pairs into rotated halves; None for no change.

    [0, 2, 4 …, 1, 3, 5 …] of the rotated ones, then the rest.
    """
    if rope is None or not rope.interleaved:
        return None
    order = torch.arange(head_dim)
    rotated = order[: rope.dim]
    return torch.cat((rotated[::2], rotated[1::2], order[rope.dim :]))


def attention_rows(attn: Attn, role: str) -> Tensor | None:
    """Rows of `role` (q, k or v) in its tensor, in our order; None for all as they come."""
    order = None if role == "v" else halves(attn.rope, attn.head_dim)
    if attn.packed == "no":
        if order is None:
            return None
        heads = attn.heads if role == "q" else attn.kv_heads
        rows = torch.arange(heads * attn.head_dim).view(heads, attn.head_dim)
    else:
        rows = packed_rows(attn)[role]
    return (rows if order is None else rows[:, order]).reshape(-1)
