"""The KV cache tensor.

    [num_blocks, layer 0 │ layer 1 │ … │ padding]

    layer   [2, block_size, num_kv_heads, head_dim]    keys, then values
            [1, block_size, 1, latent + rotated]       of latent attention
            nothing                                    of a layer without attention

A block is contiguous across layers, so moving one to another tier is one copy; kernels see a
strided view per layer. Zero-filled: what a padding row reads is finite. The padding, which models
of equal layers do not need, makes a block a whole number of every layer's rows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pagedserve.errors import StartupError
from pagedserve.spec import Attn, ModelShape


class NoRoom(StartupError):
    """The cache could not be allocated."""


ALIGNMENT = 16  # bytes: what the widest loads of a GPU ask of an address


def layer_shape(attn: Attn, block_size: int) -> tuple[int, int, int, int]:
    """What one layer has in a block."""
    return (1 if attn.values_in_keys else 2), block_size, attn.kv_heads, attn.head_dim


def block_elements(cached: list[Attn], block_size: int, dtype: torch.dtype) -> int:
    """Numbers from one block to the next."""
    used = sum(math.prod(layer_shape(attn, block_size)) for attn in cached)
    unit = math.lcm(ALIGNMENT // dtype.itemsize, *(a.kv_heads * a.head_dim for a in cached))
    return -(-used // unit) * unit


def block_bytes(spec: ModelShape, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return block_elements(spec.cached(), block_size, dtype) * dtype.itemsize


def allocate(
    spec: ModelShape, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """A view [num_blocks, 1 or 2, block_size, num_kv_heads, head_dim] per layer, of one tensor.

    Raises NoRoom, with what was asked for, where there is not so much memory.
    """
    cached = spec.cached()
    shape = (num_blocks, block_elements(cached, block_size, dtype))
    try:
        return layer_views(zeros(shape, dtype, device), cached, block_size)
    # No memory, or a size that is none: of numpy the first two, of torch the last two.
    except (MemoryError, ValueError, RuntimeError, TypeError) as error:
        size = num_blocks * block_bytes(spec, block_size, dtype) / (1 << 30)
        raise NoRoom(
            f"no memory for a KV cache of {num_blocks} blocks, {size:.1f} GiB on {device}; lower "
            "--num-gpu-blocks-override or --kv-cache-memory-bytes"
        ) from error


def layer_views(cache: Tensor, cached: list[Attn], block_size: int) -> list[Tensor]:
    """Cut [num_blocks, block_elements] into its layers."""
    views, start = [], 0
    for attn in cached:
        shape = layer_shape(attn, block_size)
        size = math.prod(shape)
        views.append(cache.narrow(1, start, size).view(cache.shape[0], *shape))
        start += size
    return views


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take no time on a CPU."""
    if device.type == "cpu":
        # numpy asks the system for zero pages, which cost nothing until they are written; torch
        # writes every zero, seconds for a cache of gigabytes.
        pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(pages).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)
