"""Attention over the paged cache: the batch, the seam, and the backends behind it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from pagedserve.attention.base import AttentionBackend, Plan
from pagedserve.attention.batch import Batch
from pagedserve.attention.cpu import CpuAttention
from pagedserve.attention.torch import TorchAttention
from pagedserve.device import Device
from pagedserve.errors import StartupError
from pagedserve.spec import ModelShape

__all__ = ["AttentionBackend", "Batch", "Plan", "choose"]


def backends(device: Device) -> tuple[Callable[[Device], AttentionBackend], ...]:
    """Those for the device, best first. Triton is imported for GPUs only: it takes a while."""
    if device.is_gpu and importlib.util.find_spec("triton"):
        from pagedserve.attention.triton import TritonAttention

        return TritonAttention, TorchAttention
    return CpuAttention, TorchAttention


def choose(
    device: Device, spec: ModelShape, kv_dtype: torch.dtype, block_size: int
) -> AttentionBackend:
    """The first backend that supports every layer. Raises StartupError with each one's reason."""
    reasons = []
    for make in backends(device):
        backend = make(device)
        found = (backend.supports(attn, kv_dtype, block_size) for attn in spec.cached())
        reason = next((text for text in found if text), None)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise StartupError(f"no attention backend fits this model: {'; '.join(reasons)}")
