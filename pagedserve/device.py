"""The device: what differs between a CPU and a CUDA GPU, chosen once.

The one room that asks which hardware there is. Everything above holds a `Device` and asks it.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, float32
from torch import dtype as Dtype

from pagedserve import config
from pagedserve.errors import StartupError
from pagedserve.kernels import cpu, cpu_matrix, paged_decode_cuda, reference
from pagedserve.kernels.experts import Experts, ExpertWeights, LoopedExperts
from pagedserve.kernels.matrix import Matrix, PlainMatrix
from pagedserve.kernels.ops import HeadOps, Ops

if TYPE_CHECKING:
    from pagedserve.kernels.gpu import GpuKernels

log = logging.getLogger("pagedserve")

CGROUP_MEMORY = (  # limit, usage: version 2, then version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that can still be allocated, and bytes in all."""

    free: int
    total: int


class Device(Protocol):
    """Where the model runs. `name` is for people, `torch` for tensors.

    `is_gpu`: launches return before the device is done, and its memory is ours to plan.
    `takes_unread`: `matrix` and `experts` look at no number of the weights that they are given, so
    these may still be on their way from a file.
    """

    name: str
    torch: torch.device
    is_gpu: bool
    takes_unread: bool

    def prepare(self) -> None:
        """Set this process up for serving; the worker calls it once, before anything is loaded."""
        ...

    def memory(self) -> Memory:
        """Free and total bytes now."""
        ...

    def wait(self) -> None:
        """For all that was launched. Raises what the device says where it computes no more."""
        ...

    def clear(self) -> None:
        """After work that broke off between two kernels: what is zero between them is zero."""
        ...

    def give_back(self) -> None:
        """Let others have the memory that is not used."""
        ...

    def reserve(self, num_bytes: int) -> None:
        """Hold so much for what is allocated later. Raises torch.OutOfMemoryError."""
        ...

    def default_dtype(self, checkpoint_dtype: Dtype) -> Dtype:
        """The dtype that "auto" means for a checkpoint held in `checkpoint_dtype`."""
        ...

    def matrix(self, weight: Tensor) -> Matrix:
        """`weight` [out, in] in the form that is multiplied by fastest here; it may be copied."""
        ...

    def experts(self, weights: ExpertWeights) -> Experts:
        """A layer's experts in the form that is fastest here; the weights may be copied."""
        ...

    def ops(self, dtype: Dtype) -> Ops:
        """The fastest forms of the other ops here, on tensors of `dtype`."""
        ...

    def head_ops(self, dtype: Dtype) -> HeadOps | None:
        """Who does all of an attention layer's small ops in one kernel, if anybody does."""
        ...


class Cpu:
    """The host itself: float32, memory bounded by the machine and by its container."""

    name = "cpu"
    torch = torch.device("cpu")
    is_gpu = False
    takes_unread = False  # weights are packed

    def prepare(self) -> None:
        # OpenMP's threads spin while they wait for each other, and stall for milliseconds when
        # another process wants their core. Ours sleep, so torch's own small ops stay on one thread.
        if cpu.load() is not None:
            torch.set_num_threads(1)
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() - 1))

    def memory(self) -> Memory:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if ":" in line}
        free, total = kib["MemAvailable"] << 10, kib["MemTotal"] << 10
        for limit_file, usage_file in CGROUP_MEMORY:
            limit, usage = read_bytes(limit_file), read_bytes(usage_file)
            if limit is not None and usage is not None and limit < total:
                free, total = min(free, max(limit - usage, 0)), limit
        return Memory(free, total)

    def wait(self) -> None:
        pass  # nothing is under way

    def clear(self) -> None:
        pass

    def give_back(self) -> None:
        pass  # free memory is nobody's here

    def reserve(self, num_bytes: int) -> None:
        pass

    def default_dtype(self, checkpoint_dtype: Dtype) -> Dtype:
        # bfloat16 matrix products are slower than these on most CPUs, and less exact.
        return float32

    def matrix(self, weight: Tensor) -> Matrix:
        kernels = self.kernels(weight.dtype)
        if kernels is not None:
            return kernels.matrix(weight)
        return cpu_matrix.pack(weight) if cpu_matrix.fits(weight) else PlainMatrix(weight)

    def experts(self, weights: ExpertWeights) -> Experts:
        return LoopedExperts.of(weights, self.matrix)

    def ops(self, dtype: Dtype) -> Ops:
        return self.kernels(dtype) or reference

    def head_ops(self, dtype: Dtype) -> HeadOps | None:
        return None

    def kernels(self, dtype: Dtype) -> cpu.Kernels | None:
        """Ours in C++, which know float32 only, where they could be compiled."""
        return cpu.load() if dtype == float32 else None


class Cuda:
    """The current CUDA GPU."""

    is_gpu = True
    takes_unread = True

    def __init__(self) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.torch)

    def prepare(self) -> None:
        # cuDNN's attention accepted a masked bfloat16 prefill and then failed to execute it (torch
        # 2.11, H200; an unaligned view of the mask is suspected). It also builds a graph for every
        # new shape, and ours never repeat. torch's other forms compute the same.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if torch.cuda.get_device_capability(self.torch) == paged_decode_cuda.CAPABILITY:
            paged_decode_cuda.build_behind()

    def memory(self) -> Memory:
        free, total = torch.cuda.mem_get_info(self.torch)
        # What torch's allocator holds without using it is free to us.
        idle = torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)
        return Memory(free + idle, total)

    def wait(self) -> None:
        # An error that ends the context, such as a wild address, is raised again by every call.
        torch.cuda.synchronize(self.torch)

    def clear(self) -> None:
        if self.kernels is not None:
            self.kernels.clear()

    def give_back(self) -> None:
        gc.collect()  # a frame in a cycle may hold tensors
        torch.cuda.empty_cache()

    def reserve(self, num_bytes: int) -> None:
        # torch's allocator keeps what it once had, and cuts later tensors out of it.
        torch.empty(num_bytes, dtype=torch.uint8, device=self.torch)

    def default_dtype(self, checkpoint_dtype: Dtype) -> Dtype:
        return checkpoint_dtype

    def matrix(self, weight: Tensor) -> Matrix:
        kernels = self.kernels
        return kernels.matrix(weight) if kernels is not None else PlainMatrix(weight)

    def experts(self, weights: ExpertWeights) -> Experts:
        kernels = self.kernels
        return kernels.experts(weights) if kernels else LoopedExperts.of(weights, self.matrix)

    def ops(self, dtype: Dtype) -> Ops:
        kernels = self.kernels
        return kernels.ops if kernels is not None else reference

    def head_ops(self, dtype: Dtype) -> HeadOps | None:
        kernels = self.kernels
        return kernels.head_ops if kernels is not None else None

    @cached_property
    def kernels(self) -> GpuKernels | None:
        """Ours in Triton, which is imported only where there is a GPU to run them."""
        if find_spec("triton") is None:
            log.warning("triton is not installed: torch computes instead (slower)")
            return None
        from pagedserve.kernels.gpu import GpuKernels

        return GpuKernels.on(self.torch, config.cache_directory())


class Outline:
    """A device with shapes and no numbers, as large as is said: what would lie there is counted."""

    torch = torch.device("meta")
    takes_unread = True

    def __init__(self, memory: Memory, *, is_gpu: bool, name: str = "outline"):
        self.name, self.is_gpu = name, is_gpu
        self._memory = memory

    def prepare(self) -> None:
        pass

    def take(self, num_bytes: int) -> None:
        """So much is not free any more; less than nothing may be left."""
        self._memory = Memory(self._memory.free - num_bytes, self._memory.total)

    def memory(self) -> Memory:
        return self._memory

    def wait(self) -> None:
        pass

    def clear(self) -> None:
        pass

    def give_back(self) -> None:
        pass

    def reserve(self, num_bytes: int) -> None:
        pass

    def default_dtype(self, checkpoint_dtype: Dtype) -> Dtype:
        return checkpoint_dtype if self.is_gpu else float32

    def matrix(self, weight: Tensor) -> Matrix:
        return PlainMatrix(weight)

    def experts(self, weights: ExpertWeights) -> Experts:
        return LoopedExperts.of(weights, self.matrix)

    def ops(self, dtype: Dtype) -> Ops:
        return reference

    def head_ops(self, dtype: Dtype) -> HeadOps | None:
        return None


def pick(wanted: str = "auto") -> Device:
    """The device for "auto", "cpu" or "cuda". Raises StartupError where it is not there."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise StartupError(f"device must be auto, cpu or cuda, got {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise StartupError(
            f"device cuda was asked for, but torch {torch.__version__} sees no CUDA GPU; "
            "check nvidia-smi and that torch is a CUDA build, or use --device cpu"
        )
    return Cpu() if wanted == "cpu" or not torch.cuda.is_available() else Cuda()


def read_bytes(path: str) -> int | None:
    """The number in a cgroup file; None where there is no file or no limit."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
