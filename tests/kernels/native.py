"""What the tests of decode in CUDA C++ share: the built kernels, rows for them, and the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pagedserve import config
from pagedserve.kernels import extension, paged_decode_cuda
from pagedserve.kernels.paged_decode_cuda import Native
from pagedserve.spec import Attn
from tests.kernels.paged import Paged, attend, error, paged

COMMON = Attn(heads=32, kv_heads=8, head_dim=128, scale=128**-0.5)
SMALL = Attn(heads=16, kv_heads=2, head_dim=64, scale=0.125)
LIMITS = {torch.bfloat16: 6e-3, torch.float16: 1.5e-3}


def built() -> Native:
    """The kernels, built if they are not yet."""
    if torch.cuda.get_device_capability() != paged_decode_cuda.CAPABILITY:
        pytest.skip("needs a GPU of capability 9.0")
    try:
        return Native(str(extension.shared_library(extension.CUDA, config.kernel_directories())))
    except extension.Unavailable as reason:
        pytest.skip(str(reason))


def rows_of(lengths: list[int], attn: Attn = COMMON, **options: Any) -> Paged:
    """Rows of one token each."""
    return rows_and_counts([(n, 1) for n in lengths], attn, **options)


def rows_and_counts(rows: list[tuple[int, int]], attn: Attn = COMMON, **options: Any) -> Paged:
    """Rows (context, tokens to compute)."""
    chosen = {"block_size": 16, "dtype": torch.bfloat16, "device": "cuda", "index": torch.int32}
    return paged(attn, rows, **(chosen | options))


def check(out: Tensor, case: Paged) -> None:
    """Against the formula, as a whole and each row."""
    wanted, limit = attend(case), LIMITS[out.dtype]
    assert error(out, wanted) < limit
    worst = (out.float() - wanted).abs().amax((1, 2)) / wanted.abs().amax((1, 2))
    assert worst.max() < 8 * limit, "a whole row is wrong"
