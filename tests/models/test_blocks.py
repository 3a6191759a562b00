"""What a layer may do with the residual stream besides adding to it, against the same in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pagedserve.layers.attention import alibi_slopes
from pagedserve.models.assembly.packing import attention_rows, stored_as
from pagedserve.models.decoder import Block, Decoder
from pagedserve.spec import Attn, Rope


@dataclass(frozen=True)
class Matrix:
    """A part of a block, or a norm of it: a product that is added to the residual, if there is one.

    Norms are called with one argument.
    """

    weight: Tensor

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, forward: Any = None, norm: Any = None
    ) -> Tensor:
        y = (x if norm is None else norm(x)) @ self.weight
        return y if residual is None else residual + y


def matrices(count: int, size: int = 7) -> list[Matrix]:
    return [Matrix(torch.randn(size, size) / size**0.5) for _ in range(count)]


def block(order: Any, parts: list[Matrix], skip: tuple[int, float] | None = None) -> Block:
    norm_a, attention, norm_b, ffn = parts
    return Block(order, norm_a, attention, None, norm_b, ffn, None, 1.0, skip)


def test_a_normed_layer_adds_to_what_its_norms_give() -> None:
    norm_a, attention, norm_b, ffn = parts = matrices(4)
    x = torch.randn(5, 7)
    h = norm_a(x)
    h = h + attention(h)
    h = norm_b(h)
    got = block("normed", parts)(x, None)  # type: ignore[arg-type]
    torch.testing.assert_close(got, h + ffn(h))


@pytest.mark.parametrize("share", (0.0, 0.8, 1.0))
def test_a_layer_mixes_in_what_an_earlier_one_got_before_anything_was_mixed_in(
    share: float,
) -> None:
    skips = (None, None, (1, share), (2, 0.3), None)
    blocks = tuple(block("sequential", matrices(4), skip) for skip in skips)
    decoder = object.__new__(Decoder)
    object.__setattr__(decoder, "blocks", blocks)
    x = start = torch.randn(3, 7)
    got_by: list[Tensor] = []
    for i, each in enumerate(blocks):
        got_by.append(x)
        if (mixed := skips[i]) is not None:
            layer, part = mixed
            x = got_by[layer] * part + x * (1 - part)
        x = each(x, None)  # type: ignore[arg-type]
    torch.testing.assert_close(decoder.through(start, None), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("interleaved", (False, True))
def test_keys_and_values_in_pairs_are_found(interleaved: bool) -> None:
    heads, kv_heads, dim = 6, 3, 4
    rope = Rope(10000.0, dim, interleaved=interleaved)
    attn = Attn(heads, kv_heads, dim, 1.0, rope=rope, packed="pairs")
    assert [stored_as(attn, role) for role in "qkv"] == ["q", "kv", "kv"]
    order = [0, 2, 1, 3] if interleaved else [0, 1, 2, 3]
    stored = torch.arange(2 * kv_heads * dim)
    pairs = stored.view(kv_heads, 2, dim)
    rows = {role: attention_rows(attn, role) for role in "qkv"}
    assert all(found is not None for found in rows.values())
    assert torch.equal(stored[rows["k"]], pairs[:, 0][:, order].flatten())
    assert torch.equal(stored[rows["v"]], pairs[:, 1].flatten())
    queries = torch.arange(heads * dim)
    assert torch.equal(queries[rows["q"]], queries.view(heads, dim)[:, order].flatten())


@pytest.mark.parametrize("packed", ("no", "qkv", "heads", "groups", "slices"))
def test_other_packings_are_one_tensor_or_three(packed: Any) -> None:
    attn = Attn(4, 4, 8, 1.0, packed=packed)
    expected = ["q", "k", "v"] if packed == "no" else ["qkv"] * 3
    assert [stored_as(attn, role) for role in "qkv"] == expected


@pytest.mark.parametrize("heads", (1, 5, 6, 12, 71))
def test_slopes_come_in_the_same_order_as_a_power_of_two_sorted_by_parity(heads: int) -> None:
    """MPT's way of saying it: of the power above, every second slope, then those between."""
    power = 1 << (heads - 1).bit_length()
    slopes = torch.tensor([2.0 ** (-8 * i / power) for i in range(1, power + 1)])
    if power != heads:
        slopes = torch.cat((slopes[1::2], slopes[::2]))[:heads]
    torch.testing.assert_close(alibi_slopes(heads, 8), slopes)
