"""The C++ kernels of `csrc/` on float32 tensors of the CPU, each beside its meaning in `reference`.

Torch checks nothing here, so every op checks what it is given before a pointer leaves Python.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pagedserve.kernels import extension, reference

P, L, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "linear_packed_bytes": (L, [L, L, N]),
    "linear_pack": (None, [P, L, L, N, P]),
    "linear": (None, [P, L, P, N, P, P, L, P, L, L, L, N]),
    "rms_norm": (None, [P, P, F, P, L, L]),
    "silu_and_mul": (None, [P, P, L, L]),
    "gelu_tanh_and_mul": (None, [P, P, L, L]),
    "gelu_tanh": (None, [P, P, L]),
    "rotary": (None, [P, L, P, P, P, L, L, L, L]),
    "kv_write": (None, [P, L, P, L, P, L, L, P, L, L, L]),
    "paged_attention": (
        None,
        [P, L, P, L, L, P, L, P, P, L, P, L, L, L, L, L, L, L, F, F, P, P, N],
    ),
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
    """The rows of a step, checked once for all layers. All int64, as in `Batch`.

    arguments: the same as the kernel takes them.
    """

    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    arguments: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        for t in (self.block_tables, self.seq_lens, self.query_start_loc):
            assert t.dtype is torch.int64 and t.stride(-1) == 1 and t.is_cpu, (t.dtype, t.device)
        count = self.block_tables.shape[0]
        assert self.seq_lens.shape == (count,) and self.query_start_loc.shape == (count + 1,)
        arguments = (
            self.block_tables.data_ptr(), self.block_tables.stride(0),
            self.seq_lens.data_ptr(), self.query_start_loc.data_ptr(), count,
        )  # fmt: skip
        object.__setattr__(self, "arguments", arguments)


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
        return gated(self.native.silu_and_mul, x)

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        """`reference.gelu_tanh_and_mul`."""
        return gated(self.native.gelu_tanh_and_mul, x)

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """`reference.gelu_tanh`."""
        check(x)
        assert x.is_contiguous()
        y = torch.empty_like(x)
        self.native.gelu_tanh(x.data_ptr(), y.data_ptr(), x.numel())
        return y

    def embed(self, input_ids: Tensor, table: Tensor) -> Tensor:
        """`reference.embed` itself."""
        return reference.embed(input_ids, table)

    def angles(
        self, positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """`reference.angles` itself: once a step, and no part of its time."""
        return reference.angles(positions, frequencies, factor, dtype)

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

    def kv_write(self, kv: Tensor, slot_mapping: Tensor, k: Tensor, v: Tensor | None) -> None:
        """`reference.kv_write`. k, v: any stride between tokens; a block's keys are contiguous."""
        tokens, heads, size = k.shape
        values, values_stride = None, 0
        if v is None:
            check(kv, k)
        else:
            check(kv, k, v)
            assert v.shape == k.shape and heads_follow(v.stride(), v.shape)
            values, values_stride = v.data_ptr(), v.stride(0)
        assert slot_mapping.shape == (tokens,) and heads_follow(k.stride(), k.shape)
        assert kv.shape[3:] == (heads, size) and kv.shape[1] == (1 if v is None else 2)
        block_stride, part_stride, *strides = kv.stride()
        assert strides == [heads * size, size, 1]
        assert slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous()
        self.native.kv_write(
            k.data_ptr(), k.stride(0), values, values_stride,
            kv.data_ptr(), block_stride, part_stride,
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
        chunk: int | None = None,
        softcap: float | None = None,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        values_in_keys: int | None = None,
    ) -> Tensor:
        """`reference.paged_attention`.

        q: any stride between tokens; a block's keys are contiguous, and its values. slopes, sinks:
        contiguous.
        """
        tokens, heads, size = q.shape
        _, parts, block_size, kv_heads, key_size = kv.shape
        block_stride, part_stride, *strides = kv.stride()
        check(q, kv)
        assert heads_follow(q.stride(), q.shape) and heads % kv_heads == 0 and key_size == size
        assert strides == [kv_heads * size, size, 1]
        value_size = size
        if values_in_keys is None:
            assert parts == 2
        else:
            assert parts == 1 and 0 < values_in_keys <= size
            value_size, part_stride = values_in_keys, 0
        assert window is None or window > 0
        assert chunk is None or chunk > 0
        assert softcap is None or softcap > 0
        out = q.new_empty((tokens, heads, value_size))
        self.native.paged_attention(
            q.data_ptr(), q.stride(0), kv.data_ptr(), block_stride, part_stride,
            *rows.arguments, out.data_ptr(), heads, kv_heads, size, value_size, block_size,
            window or 0, chunk or 0, scale, softcap or 0.0,
            None if slopes is None else per_head(slopes, heads),
            None if sinks is None else per_head(sinks, heads),
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


def gated(native: Callable[[int, int, int, int], None], x: Tensor) -> Tensor:
    """x: [T, 2 · size], gate then up → [T, size]."""
    check(x)
    count, size = x.shape[0], x.shape[1] // 2
    assert x.is_contiguous() and x.shape[1] % 2 == 0
    y = x.new_empty((count, size))
    native(x.data_ptr(), y.data_ptr(), count, size)
    return y


def heads_follow(stride: tuple[int, ...], shape: torch.Size) -> bool:
    """Whether the heads of each token of a tensor [T, heads, size] lie one after the other."""
    return stride[1:] == (shape[2], 1) or (shape[1] == 1 and stride[2] == 1)


def per_head(values: Tensor, heads: int) -> int:
    """Where one number for each head lies."""
    check(values)
    assert values.shape == (heads,) and values.is_contiguous()
    return values.data_ptr()


def check(*tensors: Tensor) -> None:
    """What every kernel asks of every float tensor."""
    for t in tensors:
        assert t.dtype is torch.float32 and t.is_cpu, (t.dtype, t.device)
