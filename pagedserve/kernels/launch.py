"""How our Triton kernels are launched: programmatic dependent launch, and what it demands of them.

With it (sm_90 and newer) the next kernel's programs start while this kernel's still run. Every
kernel that takes part has the order that was measured to pay:

    launch_dependents(PDL)      the next kernel may start as soon as all of ours have
    loads of weights            what no kernel of a step writes
    wait(PDL)                   all kernels before us are done and their writes are seen
    everything else

A kernel that is launched so must `wait`, or those behind it would see unfinished work. What it
reads before must be older than the kernel just before it in the stream: wait for a weight to be
complete (`torch.cuda.synchronize`) before the first product with it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as cuda_language


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel's programs start."""
    if PDL:
        cuda_language.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until every kernel before this one is complete."""
    if PDL:
        cuda_language.gdc_wait()


@functools.cache
def capability(index: int) -> int:
    """90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


@functools.cache
def processors(index: int) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def dependent(x: Tensor) -> dict[str, Any]:
    """Launch options of a kernel on the device of `x`: its constexpr PDL, and Triton's own."""
    pdl = x.is_cuda and capability(x.device.index) >= 90
    return {"PDL": pdl, "launch_pdl": pdl}


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << max(0, n - 1).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """x: [..., C] as [rows, C] with a contiguous last dimension; a view where that is possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
