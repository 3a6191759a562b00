"""The KV cache tensor.

    [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]

A block is contiguous across layers, so moving one to another tier is one copy; kernels see a
strided view per layer. Zero-filled: what a padding row reads is finite.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pagedserve.errors import StartupError
from pagedserve.spec import DecoderSpec


def layer_shape(spec: DecoderSpec, block_size: int) -> tuple[int, int, int]:
    """(block_size, num_kv_heads, head_dim), which all layers share."""
    shapes = {(layer.attn.kv_heads, layer.attn.head_dim) for layer in spec.layers}
    assert len(shapes) == 1, f"layers differ in their KV heads: {shapes}"
    heads, head_dim = shapes.pop()
    return block_size, heads, head_dim


def block_bytes(spec: DecoderSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, K and V."""
    size, heads, head_dim = layer_shape(spec, block_size)
    return len(spec.layers) * 2 * size * heads * head_dim * dtype.itemsize


def allocate(
    spec: DecoderSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """One view [num_blocks, 2, block_size, num_kv_heads, head_dim] per layer, of one tensor.

    Raises StartupError, with what was asked for, where there is not so much memory.
    """
    shape = (num_blocks, len(spec.layers), 2, *layer_shape(spec, block_size))
    try:
        return list(zeros(shape, dtype, device).unbind(1))
    # No memory, or a size that is none: of numpy the first two, of torch the last two.
    except (MemoryError, ValueError, RuntimeError, TypeError) as error:
        size = num_blocks * block_bytes(spec, block_size, dtype) / (1 << 30)
        raise StartupError(
            f"no memory for a KV cache of {num_blocks} blocks, {size:.1f} GiB on {device}; lower "
            "--num-gpu-blocks-override or --kv-cache-memory-bytes"
        ) from error


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take no time on a CPU."""
    if device.type == "cpu":
        # numpy asks the system for zero pages, which cost nothing until they are written; torch
        # writes every zero, seconds for a cache of gigabytes.
        pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(pages).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)
