"""Between the matrices: norms, gates, heads into the cache. Microseconds and share of the bytes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from _graphs import microseconds, read_terabytes_per_second, show

from pagedserve.kernels import activation, norm, qk_rope_kv, reference, reference_fused

TOKENS = (1, 32, 256, 2048, 8192)
HEADS, KV_HEADS, DIM, HIDDEN, SIZE = 32, 8, 128, 4096, 14336


def run(*, quick: bool, sweep: bool) -> dict[str, Any]:
    """By number of tokens; `torch` is the same by torch's ops."""
    rate = read_terabytes_per_second()
    found: dict[str, Any] = {"read_tb_per_s": round(rate, 3)}
    for tokens in TOKENS[:1] if quick else TOKENS:
        for name, (ours, plain, moved) in cases(tokens).items():
            time = microseconds([ours] * 20)
            entry = {"us": round(time, 2), "torch": round(microseconds([plain] * 5), 2)}
            entry["share of bytes"] = round(moved / rate / 1e6 / time, 3)
            found[f"{name} {tokens}"] = entry
            show(f"{name:14s} {tokens:5d} {entry}")
    return found


def cases(tokens: int) -> dict[str, Any]:
    """name → (ours, by torch, bytes moved)."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    x, residual, weight = random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN)
    gates = random(tokens, 2 * SIZE)
    width = (HEADS + 2 * KV_HEADS) * DIM
    qkv, head_weight = random(tokens, width), random(HEADS + KV_HEADS, DIM)
    blocks = -(-tokens // 16) + 1
    kv = torch.zeros(blocks, 2, 16, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    slots = torch.randperm(blocks * 16, device="cuda")[:tokens]
    angle = torch.randn(tokens, 1, DIM // 2, device="cuda")
    cos = torch.cat((angle.cos(), angle.cos()), -1).bfloat16()
    sin = torch.cat((-angle.sin(), angle.sin()), -1).bfloat16()
    heads = {"heads": HEADS, "angles": (cos, sin), "norm": head_weight}

    def by_torch() -> None:
        both = qkv.view(tokens, -1, DIM)
        qk = torch.nn.functional.rms_norm(both[:, : HEADS + KV_HEADS], (DIM,)) * head_weight
        qk = reference.rotary(qk, cos, sin)
        reference.kv_write(kv, slots, qk[:, HEADS:], both[:, HEADS + KV_HEADS :])

    return {
        "add_rms_norm": (
            lambda: norm.add_rms_norm(x, residual, weight, 1e-6),
            lambda: reference_fused.add_rms_norm(x, residual, weight, 1e-6),
            4 * x.nbytes,
        ),
        "silu_and_mul": (
            lambda: activation.silu_and_mul(gates),
            lambda: reference.silu_and_mul(gates),
            gates.nbytes * 3 // 2,
        ),
        **{
            f"qk_rope_kv by {n}": (
                partial(qk_rope_kv.qk_rope_kv, qkv, kv, slots, **heads, each=n),
                by_torch,
                2 * qkv.nbytes + 2 * cos.nbytes,
            )
            for n in (2, 4, 8, 16)
        },
        "qk_rope_kv": (
            lambda: qk_rope_kv.qk_rope_kv(qkv, kv, slots, **heads),
            by_torch,
            2 * qkv.nbytes + 2 * cos.nbytes,
        ),
    }
