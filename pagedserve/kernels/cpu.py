"""The C++ kernels of `csrc/` on float32 tensors of the CPU, each beside its meaning in `reference`.

Torch checks nothing here, so every op checks what it is given before a pointer leaves Python.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedserve.kernels import extension

P, L, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "linear_packed_bytes": (L, [L, L, N]),
    "linear_pack": (None, [P, L, L, N, P]),
    "linear": (None, [P, L, P, N, P, P, L, P, L, L, L, N]),
    "rms_norm": (None, [P, P, F, P, L, L]),
    "silu_and_mul": (None, [P, P, L, L]),
    "rotary": (None, [P, L, P, P, P, L, L, L, L]),
    "kv_write": (None, [P, L, P, L, P, L, L, P, L, L, L]),
    "paged_attention": (None, [P, L, P, L, L, P, L, P, P, P, L, L, L, L, L, L, F, N]),
}


@functools.cache
def load() -> Kernels | None:
    """The kernels; None where `extension` has none."""
    library = extension.load()
    if library is None:
        return None
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return Kernels(library)


@dataclass(frozen=True, slots=True)
class PagedRows:
    """The rows of a step, checked once for all layers. All int64, as in `Batch`."""

    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor

    def __post_init__(self) -> None:
        for t in (self.block_tables, self.seq_lens, self.query_start_loc):
            assert t.dtype is torch.int64 and t.stride(-1) == 1 and t.is_cpu, (t.dtype, t.device)
        count = self.block_tables.shape[0]
        assert self.seq_lens.shape == (count,) and self.query_start_loc.shape == (count + 1,)


class Kernels:
    """The ops of `layers` and `attention`. Every tensor is float32 unless said otherwise.

    `threads`: how many an op may use. They are its own and sleep when idle.
    """

    def __init__(self, native: ctypes.CDLL):
        self.native = native
        self.threads = torch.get_num_threads()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`reference.rms_norm`."""
        size = x.shape[-1]
        check(x, weight)
        assert x.is_contiguous() and weight.is_contiguous() and weight.shape == (size,)
        y = torch.empty_like(x)
        self.native.rms_norm(
            x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), x.numel() // size, size
        )
        return y

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """`reference.silu_and_mul`."""
        check(x)
        count, size = x.shape[0], x.shape[1] // 2
        assert x.is_contiguous() and x.shape[1] % 2 == 0
        y = x.new_empty((count, size))
        self.native.silu_and_mul(x.data_ptr(), y.data_ptr(), count, size)
        return y

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`reference.rotary`. x: any stride between tokens."""
        count, heads, size = x.shape
        rotated = cos.shape[-1]
        check(x, cos, sin)
        assert x.stride()[1:] == (size, 1) and cos.is_contiguous() and sin.is_contiguous()
        assert cos.shape == sin.shape == (count, 1, rotated) and rotated <= size
        y = x.new_empty(x.shape)
        self.native.rotary(
            x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), y.data_ptr(),
            count, heads, size, rotated,
        )  # fmt: skip
        return y

    def kv_write(self, kv: Tensor, slot_mapping: Tensor, k: Tensor, v: Tensor) -> None:
        """`reference.kv_write`. k, v: any stride between tokens; a block's keys are contiguous."""
        tokens, heads, size = k.shape
        check(kv, k, v)
        assert k.shape == v.shape and slot_mapping.shape == (tokens,)
        assert k.stride()[1:] == v.stride()[1:] == kv.stride()[3:] == (size, 1)
        assert kv.shape[3:] == (heads, size) and kv.stride(2) == heads * size
        assert slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous()
        self.native.kv_write(
            k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
            kv.data_ptr(), kv.stride(0), kv.stride(1),
            slot_mapping.data_ptr(), tokens, heads * size, kv.shape[2],
        )  # fmt: skip

    def paged_attention(
        self,
        q: Tensor,
        kv: Tensor,
        rows: PagedRows,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """`reference.paged_attention`.

        q: any stride between tokens; a block's keys are contiguous, and its values.
        """
        _, heads, size = q.shape
        _, _, block_size, kv_heads, _ = kv.shape
        check(q, kv)
        assert q.stride()[1:] == kv.stride()[3:] == (size, 1) and heads % kv_heads == 0
        assert kv.shape[4] == size and kv.stride(2) == kv_heads * size
        out = q.new_empty(q.shape)
        self.native.paged_attention(
            q.data_ptr(), q.stride(0), kv.data_ptr(), kv.stride(0), kv.stride(1),
            rows.block_tables.data_ptr(), rows.block_tables.stride(0),
            rows.seq_lens.data_ptr(), rows.query_start_loc.data_ptr(), out.data_ptr(),
            rows.seq_lens.shape[0], heads, kv_heads, size, block_size, window or 0, scale,
            self.threads,
        )  # fmt: skip
        return out

    def matrix(self, weight: Tensor) -> PackedMatrix:
        """`weight` [out, in] packed, as bfloat16 where that is exact: half the bytes to read."""
        check(weight)
        weight = weight.contiguous()
        size, columns = weight.shape
        half = bool((weight.view(torch.int32) & 0xFFFF == 0).all())
        length = self.native.linear_packed_bytes(size, columns, half)
        packed = torch.empty(length, dtype=torch.uint8)
        self.native.linear_pack(weight.data_ptr(), size, columns, half, packed.data_ptr())
        return PackedMatrix(packed, half, size, columns, self)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix [out, in] in the layout of `linear_cpu.cpp`, bfloat16 if `half`; see `Matrix`."""

    packed: Tensor
    half: bool
    size: int
    columns: int
    kernels: Kernels

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, in], any stride between rows → x · weightᵀ + bias: [T, out]."""
        return self.run(x, bias, None)

    def add(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """residual + x · weightᵀ + bias. residual: [T, out], any stride between rows."""
        check(residual)
        assert residual.shape == (x.shape[0], self.size) and residual.stride(1) == 1
        return self.run(x, bias, residual)

    def run(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        check(x)
        assert x.shape[1] == self.columns and x.stride(1) == 1
        if bias is not None:
            check(bias)
            assert bias.shape == (self.size,) and bias.is_contiguous()
        y = x.new_empty((x.shape[0], self.size))
        self.kernels.native.linear(
            x.data_ptr(), x.stride(0), self.packed.data_ptr(), self.half,
            None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            0 if residual is None else residual.stride(0),
            y.data_ptr(), x.shape[0], self.size, self.columns, self.kernels.threads,
        )  # fmt: skip
        return y

    def tensors(self) -> list[Tensor]:
        return [self.packed]


def check(*tensors: Tensor) -> None:
    """What every kernel asks of every float tensor."""
    for t in tensors:
        assert t.dtype is torch.float32 and t.is_cpu, (t.dtype, t.device)
