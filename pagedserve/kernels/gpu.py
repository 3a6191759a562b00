"""Everything of ours that a GPU runs, put together once for a device: the door for `device`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from pagedserve import config
from pagedserve.kernels import activation, dispatch, gpu_matrix, gpu_ops, launch, moe
from pagedserve.kernels.experts import Experts, ExpertWeights, LoopedExperts
from pagedserve.kernels.matrix import Matrix, PlainMatrix
from pagedserve.kernels.ops import HeadOps, Ops
from pagedserve.kernels.split_k import Scratch

TABLE = "products.json"


@dataclass(frozen=True, slots=True)
class GpuKernels:
    """`scratch` is shared by all products of a device's stream, `table` says how they are done.

    `counts`: by number of experts, zeros that all layers count their choices in. `shapes`:
    (out, in) of every matrix so far, for tuning.
    """

    scratch: Scratch
    table: dispatch.Table
    ops: Ops = gpu_ops
    head_ops: HeadOps = gpu_ops
    counts: dict[int, Tensor] = field(default_factory=dict)
    shapes: set[tuple[int, int]] = field(default_factory=set)

    @classmethod
    def on(cls, device: torch.device, cache: Path) -> GpuKernels:
        """Takes 32 MiB of `device`; reads what `tuning` once found out about it from `cache`.

        Compiled kernels are kept there too, in a directory of their own.
        """
        if (compiled := config.triton_cache_directory()) is not None:
            triton.knobs.cache.dir = str(compiled)
        index = device.index or 0
        table = dispatch.Table(
            launch.processors(index),
            launch.capability(index),
            dispatch.findings(cache / TABLE, identity(device)),
        )
        return cls(Scratch.on(device), table)

    def clear(self) -> None:
        """After work that broke off between two kernels: what is zero between them is zero."""
        for zeros in (self.scratch.count, *self.counts.values()):
            zeros.zero_()

    def matrix(self, weight: Tensor) -> Matrix:
        """`weight` [out, in] as it is; float32 by torch alone, which is exact there."""
        if not gpu_matrix.fits(weight):
            return PlainMatrix(weight)
        self.shapes.add((weight.shape[0], weight.shape[1]))
        return gpu_matrix.GpuMatrix(weight, self.scratch, self.table)

    def experts(self, weights: ExpertWeights) -> Experts:
        """By our kernels; in float32 by torch, one expert after the other."""
        if weights.up.dtype not in gpu_matrix.HALVES or weights.act not in activation.GATED:
            return LoopedExperts.of(weights, self.matrix)
        counts = self.counts.setdefault(
            weights.up.shape[0],
            torch.zeros(weights.up.shape[0], dtype=torch.int32, device=weights.up.device),
        )
        return moe.GpuExperts.of(
            weights.up,
            weights.down,
            weights.up_bias,
            weights.down_bias,
            act=weights.act,
            limit=weights.limit,
            counts=counts,
        )


def identity(device: torch.device) -> dict[str, Any]:
    """What a finding holds for: this GPU and these versions."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "triton": triton.__version__,
        "torch": torch.__version__,
    }
