"""Inputs for the fused kernels, what they mean in float32 by torch, and how far a result is off.

A check takes a device and a dtype: the interpreter's (CPU, float32) and a GPU's are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagedserve.kernels import reference, reference_fused
from pagedserve.kernels.matrix import PlainMatrix, RmsWeight

# A result rounded once, in a norm over many: half a unit in the last place of bfloat16 is 2⁻⁹.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
EPS = 1e-5


@dataclass(frozen=True)
class Place:
    """Where, and in what."""

    device: torch.device
    dtype: torch.dtype

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device).mul_(scale).to(self.dtype)

    def strided(self, rows: int, columns: int) -> Tensor:
        """Rows that do not follow each other in memory."""
        return self.random(rows, columns + 16)[:, :columns]


def assert_close(got: Tensor, wanted: Tensor, times: int = 1) -> None:
    """To so many times the tolerance of `got`'s dtype; `wanted` in float32."""
    assert got.shape == wanted.shape
    error, length = (got.double() - wanted.double()).norm(), wanted.double().norm()
    assert error <= times * TOLERANCE[got.dtype] * length, f"off by {error / length:.2e}"


def settle(place: Place) -> None:
    """Kernels may read weights before the kernel before them is done: let those be written."""
    if place.device.type == "cuda":
        torch.cuda.synchronize()


def product_inputs(
    place: Place,
    rows: int,
    size: int,
    columns: int,
    *,
    norm: bool,
    bias: bool,
    gated: str | None,
    residual: bool,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """x, weight and what is fused, as arguments of `fused`."""
    lines = size * (2 if gated else 1)
    weight = place.random(lines, columns, scale=columns**-0.5)
    around = {
        "norm": RmsWeight(place.random(columns), EPS) if norm else None,
        "bias": place.random(lines) if bias else None,
        "gated": gated,
        "residual": place.strided(rows, size) if residual else None,
    }
    return place.strided(rows, columns), weight, around


def product_meaning(x: Tensor, weight: Tensor, around: dict[str, Any]) -> Tensor:
    """In float32."""
    wide: dict[str, Any] = {
        name: value.float() if isinstance(value, Tensor) else value
        for name, value in around.items()
    }
    if wide["norm"] is not None:
        wide["norm"] = RmsWeight(wide["norm"].weight.float(), wide["norm"].eps)
    return PlainMatrix(weight.float()).fused(x.float(), **wide)


def angles(place: Place, tokens: int, rotated: int) -> tuple[Tensor, Tensor]:
    """cos and sin as `reference.rotary` wants them."""
    angle = torch.randn(tokens, 1, rotated // 2, device=place.device)
    cos, sin = angle.cos(), angle.sin()
    return (
        torch.cat((cos, cos), -1).to(place.dtype),
        torch.cat((-sin, sin), -1).to(place.dtype),
    )


@dataclass(frozen=True)
class Heads:
    """A case of `qk_rope_kv`."""

    heads: int
    kv_heads: int
    dim: int
    rotated: int
    norm: bool = False
    norm_after: bool = False


def check_heads(place: Place, case: Heads, tokens: int, slot_dtype: torch.dtype) -> None:
    """Queries returned, keys and values in their slots, nothing else touched, padding unwritten."""
    from pagedserve.kernels.qk_rope_kv import qk_rope_kv

    width = (case.heads + 2 * case.kv_heads) * case.dim
    qkv = place.strided(tokens, width)
    blocks, size = tokens // 4 + 3, 4
    pool = torch.full((blocks, 3, 2, size, case.kv_heads, case.dim), float("nan"))
    kv = pool.to(place.device, place.dtype)[:, 1]
    wanted_kv = torch.full(kv.shape, float("nan"), device=place.device)
    slots = torch.randperm(blocks * size, device=place.device)[:tokens].to(slot_dtype)
    slots[tokens // 2] = -1
    norm = place.random(case.heads + case.kv_heads, case.dim) if case.norm else None
    turn = angles(place, tokens, case.rotated) if case.rotated else None
    common: dict[str, Any] = {"heads": case.heads, "eps": EPS, "norm_after": case.norm_after}
    settle(place)
    got = qk_rope_kv(qkv, kv, slots, angles=turn, norm=norm, **common)
    wanted = reference_fused.qk_rope_kv(
        qkv.float().contiguous(),
        wanted_kv,
        slots,
        angles=None if turn is None else (turn[0].float(), turn[1].float()),
        norm=None if norm is None else norm.float(),
        **common,
    )
    assert_close(got, wanted)
    assert torch.equal(kv.isnan(), wanted_kv.isnan())
    assert_close(kv.nan_to_num(), wanted_kv.nan_to_num())


def check_norms(place: Place, rows: int, size: int) -> None:
    """All four, with what was added."""
    from pagedserve.kernels import norm

    x, residual = place.strided(rows, size), place.strided(rows, size)
    weight, bias = place.random(size), place.random(size)
    settle(place)
    wide = (x.float(), weight.float(), bias.float())
    assert_close(norm.rms_norm(x, weight, EPS), reference.rms_norm(wide[0], wide[1], EPS))
    assert_close(norm.layer_norm(x, weight, bias, EPS), reference.layer_norm(*wide, EPS))
    total = (x.float() + residual.float()).to(place.dtype)
    got, added = norm.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(added, total)
    assert_close(got, reference.rms_norm(total.float(), wide[1], EPS))
    got, added = norm.add_layer_norm(x, residual, weight, None, EPS)
    assert torch.equal(added, total)
    assert_close(got, reference.layer_norm(total.float(), wide[1], None, EPS))


def check_gate(place: Place, act: str, rows: int, size: int) -> None:
    """One gated activation."""
    from pagedserve.kernels.activation import act_and_mul

    x = place.random(rows, 2 * size + 16, scale=3.0)[:, : 2 * size]
    wanted = reference_fused.act_and_mul(x.float(), act, 1.5)
    assert_close(act_and_mul(x, act, 1.5), wanted)


def check_embed(place: Place, tokens: int, size: int) -> None:
    """Any rows of a table, the last one too."""
    from pagedserve.kernels.embedding import embed

    table = place.strided(29, size)
    ids = torch.randint(0, 29, (tokens,), device=place.device)
    ids[-1] = 28
    settle(place)
    assert torch.equal(embed(ids, table), reference.embed(ids, table))


def check_angles(place: Place, tokens: int, rotated: int, factor: float) -> None:
    """Of positions near and far."""
    from pagedserve.kernels.angles import angles

    positions = torch.randint(0, 200_000, (tokens,), device=place.device)
    frequencies = torch.rand(rotated // 2, device=place.device)
    settle(place)
    cos, sin = angles(positions, frequencies, factor, place.dtype)
    for got, wanted in zip(
        (cos, sin), reference.angles(positions, frequencies, factor, torch.float32), strict=True
    ):
        assert got.dtype == place.dtype
        assert_close(got, wanted)


def check_rotary(place: Place, heads: int, dim: int, rotated: int) -> None:
    """Of a slice of heads."""
    from pagedserve.kernels.rotary import rotary

    x = place.random(5, heads + 3, dim)[:, 1 : heads + 1]
    cos, sin = angles(place, 5, rotated)
    wanted = reference.rotary(x.float(), cos.float(), sin.float())
    assert_close(rotary(x, cos, sin), wanted)
